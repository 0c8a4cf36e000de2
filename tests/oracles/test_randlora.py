"""Oracles of RandLoRA: D = Σ_j B_j diag(Λ_j) A diag(Γ_j) over N = ceil(min(m, n) / r) frozen random bases; the update is s D.

Two pairings of basis columns with rows of A: the paper's, and the one of the released code and PEFT.
"""

import math

import pytest
import torch
from torch import nn

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, close, fill, grad, linear, put, randn

randlora = rw.catalog.randlora
SIZES = [(12, 8, 3), (8, 12, 3), (12, 8, 4)]


def by_definition(A, B, Lambda, Gamma, pairing):
    """D (mx, mn), basis column by basis column."""
    r, N = Lambda.shape
    D = torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype)
    for i in range(N * r):
        j, k = i // r, i % r
        other_k, other_j = (k, j) if pairing == "paper" else (i // N, i % N)
        D = D + torch.outer(B[:, j, k], Lambda[other_k, other_j] * A[other_k] * Gamma[other_j])
    return D


def slices(handle, m, n, rank):
    """A (r, mn) and B (mx, N, r) of one layer, from the bank."""
    mn, mx = min(m, n), max(m, n)
    return handle.bank["A"][:, :mn], handle.bank["B"][:mx, : math.ceil(mn / rank)]


def begin(m, n, rank, **options):
    model, handle, p = adapted(randlora(rank=rank, **{"alpha": 2.0 * rank, **options}), linear(m, n))
    return model, handle, p, p.roles()["Lambda"], p.roles()["Gamma"]


@pytest.mark.parametrize("pairing", ["paper", "peft"])
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_1_update_by_definition(m, n, rank, pairing):
    model, handle, _, Lambda, Gamma = begin(m, n, rank, pairing=pairing)
    mn, N = min(m, n), math.ceil(min(m, n) / rank)
    assert Lambda.shape == (rank, N) and Gamma.shape == (N, mn)
    assert handle.trained_numbers == rank * N + N * mn
    fill(handle)
    D = by_definition(*slices(handle, m, n, rank), Lambda, Gamma, pairing)
    D = 2 * (D if m >= n else D.t())
    close(handle.update_of("layer").dense(), D, 1e-10)
    x = randn(5, n, seed=1)
    close(model(x), x @ (model.layer.weight + D).t() + model.layer.bias, 1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_1_peft_gives_the_same_with_its_pairing(m, n, rank):
    peft = pytest.importorskip("peft")
    config = peft.RandLoraConfig(r=rank, randlora_alpha=2 * rank, randlora_dropout=0.0, target_modules=["layer"])
    reference = peft.get_peft_model(One(linear(m, n)), config).double().eval()
    model, handle, _, Lambda, Gamma = begin(m, n, rank, pairing="peft")
    fill(handle)
    theirs = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    A, B = slices(handle, m, n, rank)
    values = {"randlora_lambda": Lambda, "randlora_gamma": Gamma, "randlora_A": A[:, None], "randlora_B": B}
    for name, value in values.items():
        (tensor,) = [tensor for key, tensor in theirs.items() if name in key]
        assert tensor.shape == value.shape
        put(tensor, value)
    x = randn(5, n, seed=1)
    close(model(x), reference(x), 1e-10)
    _, adapter, _, *roles = begin(m, n, rank, pairing="paper")
    for mine, value in zip(roles, (Lambda, Gamma), strict=True):
        put(mine, value)
    missed = (adapter.update_of("layer").dense() - handle.update_of("layer").dense()).norm()
    assert missed > 0.5 * handle.update_of("layer").dense().norm()  # the pairings are different functions


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 8, 8), (8, 12, 8), (12, 8, 1), (7, 9, 1)])
def test_2_pairings_agree_with_one_basis_or_rank_one(m, n, rank):
    updates = []
    for pairing in ("paper", "peft"):
        _, handle, *_ = begin(m, n, rank, pairing=pairing)
        fill(handle)
        updates.append(handle.update_of("layer").dense())
    close(updates[0], updates[1], 1e-12)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
@pytest.mark.parametrize(("m", "n", "rank"), [*SIZES, (8, 8, 2)])
def test_2_the_update_has_full_rank(m, n, rank, pairing):
    _, handle, *_ = begin(m, n, rank, pairing=pairing)
    fill(handle)
    S = torch.linalg.svdvals(handle.update_of("layer").dense())
    assert S.shape == (8,) and S[-1] > 1e-6 * S[0]


@pytest.mark.parametrize("pairing", ["paper", "peft"])
def test_3_start(pairing):
    layer, x, g = linear(12, 8), randn(9, 8, seed=1), randn(9, 12, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(randlora(rank=3, pairing=pairing), layer)
    Lambda, Gamma = p.roles()["Lambda"], p.roles()["Gamma"]
    assert torch.equal(model(x), base)
    assert not Lambda.any() and torch.equal(Gamma, torch.full((3, 8), 1 / 8, dtype=torch.float64))
    backward(model, x, g)
    assert not grad(Gamma).any() and grad(Lambda).abs().min() > 0
    _, _, _, _, Gamma = begin(2, 3, 1)
    assert torch.equal(Gamma, torch.full((2, 2), 1 / 2, dtype=torch.float64))  # 1 / max(N, mn)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
def test_3_bilinearity(pairing):
    _, handle, _, Lambda, Gamma = begin(12, 8, 3, pairing=pairing)
    fill(handle)
    before = handle.update_of("layer").dense().detach()
    put(Lambda, Lambda * 4)
    close(handle.update_of("layer").dense(), 4 * before, 1e-12)
    put(Gamma, Gamma / 4)
    close(handle.update_of("layer").dense(), before, 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 640.0])
def test_3_the_scale_is_alpha_over_r(alpha):
    _, handle, _, Lambda, Gamma = begin(12, 8, 3, alpha=alpha)
    fill(handle)
    D = by_definition(*slices(handle, 12, 8, 3), Lambda, Gamma, "paper")
    close(handle.update_of("layer").dense(), alpha / 3 * D, 1e-12)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
def test_4_a_wide_layer_is_the_transpose_of_a_tall_one(pairing):
    _, tall, *_ = begin(12, 8, 3, pairing=pairing)
    _, wide, *_ = begin(8, 12, 3, pairing=pairing)
    fill(tall)
    fill(wide)
    for name in ("A", "B"):
        assert tall.bank[name].shape == wide.bank[name].shape
        put(wide.bank[name], tall.bank[name])
    close(wide.update_of("layer").dense(), tall.update_of("layer").dense().t(), 1e-12)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
def test_5_bases_are_slices_of_one_pair(pairing):
    def build(seed):
        model = nn.ModuleDict({"one": linear(9, 5), "two": linear(8, 12, seed=1), "three": linear(4, 4, seed=2)})
        return rw.adapt_(model, randlora(rank=3, alpha=3.0, pairing=pairing), where=["one", "two", "three"], seed=seed)

    handle, again, other = build(0), build(0), build(1)
    A, B = handle.bank["A"], handle.bank["B"]
    assert A.shape == (3, 8) and B.shape == (12, 3, 3)  # N = ceil(8 / 3) = 3: the last basis is partly superfluous
    assert not A.requires_grad and not B.requires_grad
    assert torch.equal(again.bank["A"], A) and torch.equal(again.bank["B"], B)
    assert not torch.equal(other.bank["A"], A) and not torch.equal(other.bank["B"], B)
    fill(handle)
    for site, (m, n) in {"one": (9, 5), "two": (8, 12), "three": (4, 4)}.items():
        roles = handle.parameterization(site).roles()
        assert roles["Lambda"].shape == (3, math.ceil(min(m, n) / 3))
        D = by_definition(A[:, : min(m, n)], B[: max(m, n), : roles["Lambda"].shape[1]], *roles.values(), pairing)
        close(handle.update_of(site).dense(), D if m >= n else D.t(), 1e-10)
    frozen = sum(tensor.numel() for tensor in handle.model.buffers() if tensor.is_floating_point())
    assert frozen == A.numel() + B.numel()  # no layer has random numbers of its own


@pytest.mark.parametrize("pairing", ["paper", "peft"])
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("tokens", [2, 200])
def test_6_backward(m, n, rank, pairing, tokens):
    model, handle, _, Lambda, Gamma = begin(m, n, rank, pairing=pairing)
    fill(handle)
    x, g = randn(tokens, n, seed=1).requires_grad_(), randn(tokens, m, seed=2)
    model.zero_grad()
    (model(x) * g).sum().backward()
    A, B = slices(handle, m, n, rank)
    mine = [tensor.detach().clone().requires_grad_() for tensor in (Lambda, Gamma)]
    D = by_definition(A, B, *mine, pairing)
    matrix = model.layer.weight.detach() + 2 * (D if m >= n else D.t())
    (x.detach() @ matrix.t() * g).sum().backward()
    for found, expected in zip((Lambda, Gamma), mine, strict=True):
        close(grad(found), grad(expected), 1e-10)
    close(grad(x), g @ matrix.detach(), 1e-10)


@pytest.mark.parametrize("projection", ["dense", "sparse", "very_sparse"])
def test_6_projections(projection):
    _, handle, _ = adapted(randlora(rank=32, projection=projection), linear(256, 256))
    A, B = handle.bank["A"], handle.bank["B"]
    for tensor in (A, B):
        assert float(tensor.std()) == pytest.approx(1, rel=0.02)
    together = torch.cat([A.flatten(), B.flatten()])
    if projection == "dense":  # uniform, divided by its own standard deviation
        assert float(together.abs().max()) == pytest.approx(3**0.5, rel=0.02)
        return
    for tensor in (A, B):
        assert tensor[tensor != 0].abs().std() < 0.02  # -c, 0 and c
    share = 1 / 3 if projection == "sparse" else 1 / 16
    assert float((together != 0).double().mean()) == pytest.approx(share, rel=0.05 if projection == "sparse" else 0.08)
    assert float((together > 0).double().mean()) == pytest.approx(share / 2, rel=0.1)
