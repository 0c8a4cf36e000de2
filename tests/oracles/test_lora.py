"""Oracles of LoRA: W' = W + s·B A, s = α/r, B = 0 at the start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

lora = rw.catalog.lora


@pytest.mark.parametrize(("alpha", "start"), [(5.0, "kaiming"), (None, "kaiming"), (5.0, "orthonormal")])
def test_1_start_and_first_gradients(alpha, start):
    layer, x, g = linear(7, 5), randn(11, 5, seed=1), randn(11, 7, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(lora(rank=2, alpha=alpha, input_start=start), layer)
    model.eval()
    assert torch.equal(model(x), base)
    G, s = backward(model, x, g), 1.0 if alpha is None else alpha / 2
    assert torch.equal(grad(p.roles()["A"]), torch.zeros(2, 5, dtype=torch.float64))
    close(grad(p.roles()["B"]), s * G @ p.roles()["A"].t(), 1e-10)


def test_1_first_gradients_in_float32():
    x, g = randn(11, 5, seed=1).float(), randn(11, 7, seed=2).float()
    model, _, p = adapted(lora(rank=2, alpha=5.0), linear(7, 5, dtype=torch.float32))
    G = backward(model, x, g)
    close(grad(p.roles()["B"]), 2.5 * G @ p.roles()["A"].t(), 1e-5)


def test_1_gradients_at_a_generic_point():
    x, g = randn(11, 5, seed=1), randn(11, 7, seed=2)
    model, handle, p = adapted(lora(rank=2, alpha=5.0), linear(7, 5))
    fill(handle)
    G, B, A = backward(model, x, g), p.roles()["B"], p.roles()["A"]
    close(grad(B), 2.5 * G @ A.t(), 1e-10)
    close(grad(A), 2.5 * B.t() @ G, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_2_merge_equals_forward_and_unmerge_restores(dtype, tolerance):
    layer = linear(7, 5, dtype=dtype)
    W, b, x = layer.weight.detach().clone(), layer.bias.detach().clone(), randn(9, 5, seed=1, dtype=dtype)
    model, handle, p = adapted(lora(rank=2, alpha=3.0), layer)
    fill(handle)
    before = model(x).detach()
    roles = p.roles()
    handle.merge_()
    close(F.linear(x, layer.weight, b), before, tolerance)
    close(model(x), before, tolerance)
    close(layer.weight, W + 1.5 * roles["B"] @ roles["A"], tolerance)
    handle.unmerge_()
    assert (layer.weight - W).norm() <= 1e-6 * W.norm()


def test_3_gauge_and_rank():
    x = randn(9, 6, seed=1)
    model, handle, p = adapted(lora(rank=3, alpha=2.0), linear(8, 6))
    fill(handle)
    before, B, A = model(x).detach(), p.roles()["B"], p.roles()["A"]
    M = randn(3, 3, seed=9)
    put(B, B @ M)
    put(A, torch.linalg.inv(M) @ A)
    close(model(x), before, 1e-10)
    values = torch.linalg.svdvals(handle.update_of("layer").dense().float())
    assert values[3] < 1e-6 * values[0] and values[2] > 1e-3 * values[0]


def test_4_least_squares_reaches_the_closed_form():
    X, Y = randn(40, 8, seed=1) * torch.linspace(0.5, 1.5, 8, dtype=torch.float64), randn(40, 8, seed=2)
    layer = linear(8, 8, bias=False)
    W = layer.weight.detach().clone()
    P = torch.linalg.cholesky(X.t() @ X)
    E = (Y.t() - W @ X.t()) @ X @ torch.linalg.inv(X.t() @ X)
    U, S, Vh = torch.linalg.svd(E @ P)
    best = (U[:, :2] * S[:2]) @ Vh[:2] @ torch.linalg.inv(P)

    def loss_of(D):
        return float((X @ (W + D).t() - Y).square().sum())

    model, handle, p = adapted(lora(rank=2), layer)
    assert p.scale == 1.0
    # the closed form is a stationary point of the true problem: alternating least squares cannot leave it
    B, A = U[:, :2] * S[:2], Vh[:2] @ torch.linalg.inv(P)
    Z = X @ A.t()
    close(torch.linalg.lstsq(Z, Y - X @ W.t()).solution.t(), B, 1e-8)
    # and no better rank-2 map is found by training
    optimizer = torch.optim.LBFGS(list(p.roles().values()), lr=1, max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (model(X) - Y).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    reached, closed = loss_of(handle.update_of("layer").dense().detach()), loss_of(best)
    assert -1e-9 * closed <= reached - closed <= 1e-3 * closed


@pytest.mark.parametrize(("m", "n"), [(6, 4), (4, 6), (5, 5)])
def test_5_full_rank_reaches_anything(m, n):
    r, D = min(m, n), randn(m, n, seed=3)
    _, handle, p = adapted(lora(rank=r), linear(m, n))
    assert handle.trained_numbers == r * (m + n)
    eye = torch.eye(r, dtype=torch.float64)
    put(p.roles()["B"], D if n == r else eye)
    put(p.roles()["A"], eye if n == r else D)
    close(handle.update_of("layer").dense(), D, 1e-12)


def test_6_convolution_is_the_reshaped_update_and_the_chain_of_two():
    geometry = {"stride": 2, "padding": 1, "dilation": 2}
    layer, x = nn.Conv2d(3, 6, 3, **geometry).double(), randn(2, 3, 9, 8, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(lora(rank=2, alpha=3.0), layer)
    fill(handle)
    B, A = p.roles()["B"], p.roles()["A"]
    branch = model(x) - base
    dense = F.conv2d(x, 1.5 * (B @ A).reshape(6, 3, 3, 3), **geometry)
    chain = 1.5 * F.conv2d(F.conv2d(x, A.reshape(2, 3, 3, 3), **geometry), B.reshape(6, 2, 1, 1))
    close(branch, dense, 1e-10)
    close(chain, dense, 1e-10)
    close(handle.update_of("layer").dense(), 1.5 * B @ A, 1e-12)
