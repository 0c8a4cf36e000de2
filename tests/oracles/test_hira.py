"""Oracles of HiRA: W' = W + W ∘ (B A), an update that inherits the rank and the zeros of W."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

hira = rw.catalog.hira
M, N, R = 12, 8, 3


def generic(W=None, *, rank=R):
    """(model, handle, B, A, W) at a generic point."""
    layer = linear(M, N)
    if W is not None:
        put(layer.weight, W)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(hira(rank=rank), layer)
    fill(handle)
    return model, handle, p.roles()["B"], p.roles()["A"], W


def test_start():
    x, g, layer = randn(9, N, seed=1), randn(9, M, seed=2), linear(M, N)
    base = layer(x).detach()
    model, handle, p = adapted(hira(rank=R), layer)
    roles = p.roles()
    assert roles["B"].shape == (M, R) and roles["A"].shape == (R, N) and handle.trained_numbers == R * (M + N)
    assert torch.equal(roles["B"], torch.zeros(M, R, dtype=DOUBLE)) and roles["A"].abs().min() > 0
    close(model(x), base, 1e-14)
    backward(model, x, g)
    assert grad(roles["B"]).abs().max() > 0


def test_1_formula_and_the_form_by_ranks():
    x = randn(9, N, seed=1)
    model, handle, B, A, W = generic()
    delta = W * (B @ A)
    close(handle.update_of("layer").dense(), delta, 1e-12)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)
    by_ranks = sum(B[:, k] * F.linear(A[k] * x, W) for k in range(R))
    close(model(x) - F.linear(x, W, model.layer.bias), by_ranks, 1e-12)


def test_1_equals_peft():
    peft = pytest.importorskip("peft")
    x = randn(9, N, seed=1)
    model, _, B, A, _ = generic()
    other = One(linear(M, N))
    peft.inject_adapter_in_model(peft.HiraConfig(r=R, target_modules=["layer"]), other)
    put(other.layer.hira_A["default"], A)
    put(other.layer.hira_B["default"], B)
    close(model(x), other(x), 1e-12)
    other.layer.merge()
    close(rw.effective_weights(model)["layer.weight"], other.layer.get_base_layer().weight.detach(), 1e-12)


def test_1_convolution_and_embedding():
    layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2).to(DOUBLE), randn(2, 4, 5, 5, seed=1)
    W, base = layer.weight.detach().clone(), layer(x).detach()
    model, handle, p = adapted(hira(rank=2), layer)
    close(model(x), base, 1e-14)
    fill(handle)
    product = p.roles()["B"].reshape(6, 2) @ p.roles()["A"].reshape(2, -1)
    close(model(x), F.conv2d(x, W * (1 + product.reshape(W.shape)), layer.bias, padding=1, groups=2), 1e-12)

    table, tokens = nn.Embedding(10, 6).to(DOUBLE), torch.tensor([[0, 3, 9], [3, 1, 0]])
    E, base = table.weight.detach().clone(), table(tokens).detach()
    model, handle, p = adapted(hira(rank=2), table)
    A, B = p.roles()["A"], p.roles()["B"]
    assert A.shape == (2, 10) and B.shape == (6, 2)
    assert torch.equal(A, torch.zeros(2, 10, dtype=DOUBLE)) and B.abs().min() > 0  # the zero sits in A here
    assert torch.equal(model(tokens), base)
    fill(handle)
    close(model(tokens), F.embedding(tokens, E * (1 + (B @ A).t())), 1e-12)


def test_2_with_a_weight_of_ones_it_is_lora():
    x = randn(9, N, seed=1)
    model, _, B, A, _ = generic(torch.ones(M, N, dtype=DOUBLE))
    layer = linear(M, N)
    put(layer.weight, 1.0)
    other, _, q = adapted(rw.catalog.lora(rank=R), layer)
    put(q.roles()["B"], B)
    put(q.roles()["A"], A)
    close(model(x), other(x), 1e-12)


@pytest.mark.parametrize("rank_of_weight", [2, 8])
def test_3_rank_one_keeps_the_rank_of_the_weight(rank_of_weight):
    _, handle, B, A, W = generic(randn(M, rank_of_weight, seed=1) @ randn(rank_of_weight, N, seed=2), rank=1)
    delta = handle.update_of("layer").dense().detach()
    assert torch.linalg.matrix_rank(delta, rtol=1e-10) == rank_of_weight
    close(delta, B * W * A, 1e-12)


def test_3_a_small_rank_reaches_full_rank():
    _, handle, _, _, _ = generic(randn(M, 4, seed=1) @ randn(4, N, seed=2), rank=2)
    assert torch.linalg.matrix_rank(handle.update_of("layer").dense().detach(), rtol=1e-10) == min(2 * 4, M, N)


def test_4_zeros_of_the_weight_stay_zero():
    W = linear(M, N).weight.detach() * (torch.rand(M, N, generator=torch.Generator().manual_seed(3)) < 0.5)
    layer, x, y = linear(M, N), randn(20, N, seed=1), randn(20, M, seed=2)
    put(layer.weight, W)
    model, handle, _ = adapted(hira(rank=R), layer)
    optimizer = handle.optimizer(lr=0.05)
    for _ in range(5):
        (model(x) - y).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    trained = rw.effective_weights(model)["layer.weight"]
    assert torch.equal(trained[W == 0], W[W == 0]) and (W == 0).sum() > 30
    assert (trained[W != 0] - W[W != 0]).abs().min() > 0


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_5_merge_and_unmerge_to_the_bit(dtype):
    layer, x = linear(M, N, dtype=dtype), randn(9, N, seed=1, dtype=dtype)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(hira(rank=R), layer)
    fill(handle)
    before, expected = model(x).detach(), W.double() * (1 + p.roles()["B"].double() @ p.roles()["A"].double())
    handle.merge_()
    tolerance = {DOUBLE: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    close(model.layer.weight.double(), expected, tolerance)
    close(model(x), before, 2 * tolerance)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)


def test_6_scaling_the_weight_scales_the_update():
    _, handle, B, A, W = generic()
    _, other, B2, A2, _ = generic(3.0 * W)
    put(B2, B)
    put(A2, A)
    close(other.update_of("layer").dense(), 3.0 * handle.update_of("layer").dense(), 1e-12)


def test_7_rank_one_is_an_input_gain_and_an_output_gain():
    # W' minus the base is what an input gain a (as in IA3) followed by an output gain b makes of the layer without bias.
    x = randn(9, N, seed=1)
    model, _, B, A, W = generic(rank=1)
    gained = B[:, 0] * F.linear(A[0] * x, W)
    close(model(x) - F.linear(x, W, model.layer.bias), gained, 1e-12)


def test_8_gradients():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, B, A, W = generic()
    x.requires_grad_(True)
    G = backward(model, x, g).detach()
    copies = [tensor.detach().clone().requires_grad_(True) for tensor in (B, A)]
    plain = x.detach().clone().requires_grad_(True)
    (F.linear(plain, W * (1 + copies[0] @ copies[1]), model.layer.bias) * g).sum().backward()
    for tensor, copy in zip((B, A, x), (*copies, plain), strict=True):
        close(grad(tensor), grad(copy), 1e-10)
    close(grad(B), (G * W) @ A.detach().t(), 1e-10)
    close(grad(A), B.detach().t() @ (G * W), 1e-10)
