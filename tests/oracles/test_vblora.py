"""Oracles of VB-LoRA: the factors are cut into pieces of length b, each a softmax-weighted top-k mix of a shared bank.

The byte layout of the compact form (ids and k-1 weights) is not tested here, only that ids and weights are enough.
"""

import pytest
import torch
from torch import nn

import rankwise as rw
from tests.oracles.tools import One, adapted, close, fill, grad, linear, put, randn

vblora = rw.catalog.vblora
M, N, R, H, LENGTH = 12, 8, 3, 6, 4
OPTIONS = {"rank": R, "vectors": H, "length": LENGTH}


def piece(logits, vectors, top):
    """One piece, by sorting: the `top` largest logits, softmax over those alone."""
    ids = sorted(range(logits.numel()), key=lambda i: -float(logits[i]))[:top]
    exponentials = torch.exp(logits[ids] - logits[ids].max())
    return sum(w * vectors[i] for w, i in zip(exponentials / exponentials.sum(), ids, strict=True))


def rebuilt(logits_A, logits_B, vectors, top):
    """(B, A) piece by piece."""
    r, pieces, b = logits_A.shape[0], logits_A.shape[1], vectors.shape[1]
    A = torch.stack([torch.cat([piece(logits_A[k, j], vectors, top) for j in range(pieces)]) for k in range(r)])
    columns = [torch.cat([piece(logits_B[i, k], vectors, top) for i in range(logits_B.shape[0])]) for k in range(r)]
    B = torch.stack(columns, 1)
    assert A.shape == (r, pieces * b)
    return B, A


def begin(start="paper", top=2, layer=None, **more):
    model, handle, p = adapted(vblora(start=start, top=top, **{**OPTIONS, **more}), layer or linear(M, N))
    return model, handle, p, p.roles()["logits_A"], p.roles()["logits_B"], handle.bank["vectors"]


def update(handle):
    return handle.update_of("layer").dense().detach()


@pytest.mark.parametrize("top", [1, 2, 4])
def test_1_rebuild(top):
    model, handle, _, logits_A, logits_B, vectors = begin(top=top)
    assert logits_A.shape == (R, N // LENGTH, H) and logits_B.shape == (M // LENGTH, R, H) and vectors.shape == (H, LENGTH)
    fill(handle)
    B, A = rebuilt(logits_A, logits_B, vectors, top)
    close(update(handle), B @ A, 1e-12)
    x = randn(5, N, seed=1)
    close(model(x), x @ (model.layer.weight + B @ A).t() + model.layer.bias, 1e-12)
    factors = handle.low_rank_of("layer")
    assert factors is not None and factors.rank == R


@pytest.mark.filterwarnings("ignore")
def test_1_peft_gives_the_same():
    peft = pytest.importorskip("peft")
    config = peft.VBLoRAConfig(r=R, num_vectors=H, vector_length=LENGTH, topk=2, vblora_dropout=0.0, target_modules=["layer"])
    reference = peft.get_peft_model(One(linear(M, N)), config).double().eval()
    model, handle, _, *tensors = begin()
    fill(handle)
    for name, tensor in zip(("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"), tensors, strict=True):
        (theirs,) = [parameter for key, parameter in reference.named_parameters() if name in key]
        put(theirs, tensor)
    x = randn(5, N, seed=1)
    close(model(x), reference(x), 1e-10)


def test_1_where_it_starts():
    _, handle, _, logits_A, logits_B, vectors = begin(layer=linear(60, 80), vectors=50, length=20)
    assert 0.0196 < float(vectors.abs().max()) <= 0.02
    assert float(vectors.std()) == pytest.approx(0.02 / 3**0.5, rel=0.1)
    for logits in (logits_A, logits_B):
        assert float(logits.std()) == pytest.approx(0.1, rel=0.15)
    B, A = rebuilt(logits_A, logits_B, vectors, 2)
    assert (B @ A).norm() > 0
    close(update(handle), B @ A, 1e-12)  # the paper's start is near the base, not at it


def test_1_the_compensated_start_is_the_base():
    layer, x = linear(M, N), randn(5, N, seed=1)
    base = layer(x).detach()
    model, handle, _, logits_A, logits_B, vectors = begin("compensated", layer=layer)
    close(model(x), base, 1e-14)
    B0, A0 = (factor.detach().clone() for factor in rebuilt(logits_A, logits_B, vectors, 2))
    assert (B0 @ A0).norm() > 0
    fill(handle)
    B, A = rebuilt(logits_A, logits_B, vectors, 2)
    close(update(handle), B @ A - B0 @ A0, 1e-12)
    close(model(x) - base, x @ (B @ A - B0 @ A0).t(), 1e-12)


@pytest.mark.parametrize(("m", "n"), [(12, 10), (10, 8)])
def test_1_sizes_that_the_length_does_not_divide_are_refused(m, n):
    with pytest.raises(rw.RankwiseError):
        adapted(vblora(**OPTIONS), linear(m, n))


@pytest.mark.parametrize("top", [1, 3])
def test_2_ids_and_weights_are_enough(top, tmp_path):
    x = randn(5, N, seed=1)
    model, handle, _, logits_A, logits_B, _ = begin(top=top)
    fill(handle)
    before = model(x).detach()
    for logits in (logits_A, logits_B):
        values, ids = logits.detach().topk(top, dim=-1)
        first = values.softmax(-1)[..., :-1]  # what is stored: ids and k-1 weights
        weights = torch.cat([first, (1 - first.sum(-1, keepdim=True)).clamp(min=0)], -1)
        put(logits, torch.full_like(logits, -torch.inf).scatter(-1, ids, weights.log()))
    close(model(x), before, 1e-6)
    handle.save(tmp_path / "adapter")
    again = rw.load_(One(linear(M, N)), tmp_path / "adapter", trainable=False)
    close(again.model(x), before, 1e-6)
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


def test_3_with_one_vector_per_piece_the_logits_get_nothing():
    x, g = randn(5, N, seed=1), randn(5, M, seed=2)
    model, handle, _, logits_A, logits_B, vectors = begin(top=1)
    fill(handle)
    rows = vectors.detach()
    factors = handle.low_rank_of("layer")
    assert factors is not None
    A = factors.A.detach().reshape(R, N // LENGTH, LENGTH)
    assert torch.equal(A, rows[logits_A.argmax(-1)])
    (model(x) * g).sum().backward()
    for logits in (logits_A, logits_B):
        assert logits.grad is None or logits.grad.abs().max() < 1e-14
    assert grad(vectors).any()


def test_4_the_order_of_the_bank_does_not_matter():
    _, handle, _, logits_A, logits_B, vectors = begin()
    fill(handle)
    before, order = update(handle), torch.tensor([3, 0, 5, 1, 4, 2])
    put(vectors, vectors[order])
    assert not torch.allclose(update(handle), before)
    for logits in (logits_A, logits_B):
        put(logits, logits[..., order])
    close(update(handle), before, 1e-12)


def test_5_a_constant_on_a_logit_vector_does_not_matter():
    _, handle, _, logits_A, logits_B, _ = begin(top=3)
    fill(handle)
    before = update(handle)
    put(logits_A, logits_A + randn(R, N // LENGTH, 1, seed=3))
    put(logits_B, logits_B + randn(M // LENGTH, R, 1, seed=4))
    close(update(handle), before, 1e-12)


def test_6_all_vectors_are_a_dense_softmax():
    _, handle, _, logits_A, logits_B, vectors = begin(top=H)
    fill(handle)
    A = (logits_A.softmax(-1) @ vectors).reshape(R, N)
    B = (logits_B.softmax(-1) @ vectors).transpose(1, 2).reshape(M, R)
    close(update(handle), B @ A, 1e-12)


@pytest.mark.parametrize("start", ["paper", "compensated"])
def test_7_one_bank_whose_gradient_is_the_sum_over_layers(start):
    x, g = randn(5, 8, seed=1), randn(5, 4, seed=2)
    model = nn.Sequential(linear(12, 8), linear(4, 12, seed=1))
    plain = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in model]
    handle = rw.adapt_(model, vblora(start=start, **OPTIONS), where=["0", "1"])
    vectors = handle.bank["vectors"]
    assert sum(parameter is vectors for parameter in model.parameters()) == 1
    assert handle.trained_numbers == H * LENGTH + sum(R * H * (m + n) // LENGTH for m, n in ((12, 8), (4, 12)))
    offsets = []
    for site in ("0", "1"):
        p = handle.parameterization(site)
        start_B, start_A = rebuilt(p.roles()["logits_A"], p.roles()["logits_B"], vectors, 2)
        offsets.append((start_B @ start_A).detach() if start == "compensated" else 0.0)
    fill(handle)
    (model(x) * g).sum().backward()
    copies, h = [vectors.detach().clone().requires_grad_() for _ in plain], x
    for k, (W, b) in enumerate(plain):  # every layer with a bank of its own, holding the same values
        roles = handle.parameterization(str(k)).roles()
        B, A = rebuilt(roles["logits_A"].detach(), roles["logits_B"].detach(), copies[k], 2)
        h = h @ (W + B @ A - offsets[k]).t() + b
    (h * g).sum().backward()
    close(model(x), h, 1e-12)
    close(grad(vectors), grad(copies[0]) + grad(copies[1]), 1e-10)
    assert grad(copies[0]).any() and grad(copies[1]).any()
