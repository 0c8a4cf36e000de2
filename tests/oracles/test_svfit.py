"""Oracles of SVFit: W' = W + U_r diag(e) V_rᵀ with the leading singular vectors frozen and the increment e = t - σ_r trained.

The residual form of the paper (W_e stored in place of W) is not offered, so its identity is checked on the frozen triplets.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, close, fill, grad, linear, put, randn

svfit = rw.catalog.svfit
M, N = 7, 5


def generic(rank=3, m=M, n=N):
    """(model, handle, parameterization, e, W, U, S, Vh) at a generic point; U, S, Vh are those of a decomposition made here."""
    layer = linear(m, n)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(svfit(rank=rank), layer)
    fill(handle)
    return model, handle, p, p.roles()["increment"], W, *torch.linalg.svd(W, full_matrices=False)


def outer_sum(U, e, Vh):
    """Σ e_i u_i v_iᵀ, which does not depend on the signs of the pairs."""
    k = len(e)
    return (U[:, :k] * e) @ Vh[:k]


@pytest.mark.parametrize("rank", [1, 3, None])
def test_1_starts_at_the_base_to_the_bit(rank):
    layer, x = linear(M, N), randn(9, N, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(svfit(rank=rank), layer)
    assert torch.equal(model(x), base)
    assert torch.equal(p.roles()["increment"], torch.zeros(rank or min(M, N), dtype=DOUBLE))
    assert handle.trained_numbers == (rank or min(M, N))


@pytest.mark.parametrize(("m", "n"), [(M, N), (N, M)])
def test_1_residual_and_kept_part_are_the_weight_in_float32(m, n):
    layer = linear(m, n, dtype=torch.float32)
    W = layer.weight.detach().clone()
    _, _, p = adapted(svfit(rank=3), layer)
    S = torch.linalg.svdvals(W)
    close(p.S, S[:3], 1e-5)
    residual = W - (p.U * p.S) @ p.Vh
    close(residual + (p.U * p.S) @ p.Vh, W, 1e-5)
    close(torch.linalg.svdvals(residual)[: min(m, n) - 3], S[3:], 1e-4)  # what is kept is the leading part, and only that
    assert torch.linalg.svdvals(residual)[min(m, n) - 3 :].max() < 1e-5 * S[0]


@pytest.mark.parametrize("rank", [3, None])
def test_2_gradient(rank):
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, _, e, _, U, _, Vh = generic(rank)
    G = backward(model, x, g)
    close(grad(e), torch.stack([U[:, i] @ G @ Vh[i] for i in range(len(e))]), 1e-10)


@pytest.mark.parametrize("rank", [2, 5])
def test_3_singular_values_and_frames(rank):
    _, handle, _, e, W, U, S, Vh = generic(rank)
    adapted_weight = W + handle.update_of("layer").dense().detach()
    expected = torch.cat([(S[:rank] + e.detach()).abs(), S[rank:]]).sort(descending=True).values
    close(torch.linalg.svdvals(adapted_weight), expected, 1e-10)
    diagonal = U.t() @ adapted_weight @ Vh.t()  # the same frames: the action is diagonal there
    close(diagonal, torch.diag(torch.cat([S[:rank] + e.detach(), S[rank:]])), 1e-10)
    for left, right in ((adapted_weight @ adapted_weight.t(), W @ W.t()), (adapted_weight.t() @ adapted_weight, W.t() @ W)):
        assert (left @ right - right @ left).norm() < 1e-8
    assert (left @ right).norm() > 1.0


def test_3_rank_zero_trains_nothing():
    layer, x = linear(M, N), randn(4, N, seed=1)
    base = layer(x).detach()
    try:
        model, handle, _ = adapted(svfit(rank=0), layer)
    except rw.RankwiseError:
        return  # refusing an adapter that trains nothing is right as well; taking 0 for "all" is not
    assert handle.trained_numbers == 0
    assert torch.equal(model(x), base)


def test_3_a_multiple_of_the_spectrum_scales_the_weight():
    x = randn(9, N, seed=1)
    model, _, p, e, W, *_ = generic(None)
    put(e, 0.7 * p.S)
    close(rw.effective_weights(model)["layer.weight"], 1.7 * W, 1e-12)
    close(model(x) - model.layer.bias, 1.7 * x @ W.t(), 1e-12)


def test_4_training_reaches_the_decoupled_closed_form():
    X, Y = randn(60, N, seed=1), randn(60, M, seed=2)
    model, _, _, e, W, U, _, Vh = generic()
    bias = model.layer.bias.detach()
    squares = (X @ Vh[:3].t()).square().sum(0)  # |v_iᵀ X|², the X of the formula being (n, T)
    best = torch.stack([U[:, i] @ (Y - F.linear(X, W, bias)).t() @ (X @ Vh[i]) for i in range(3)]) / squares

    def loss(value):
        return 0.5 * (X @ (W + outer_sum(U, value, Vh)).t() + bias - Y).square().sum()

    close(torch.autograd.functional.hessian(loss, torch.zeros(3, dtype=DOUBLE)), torch.diag(squares), 1e-10)
    for _ in range(100):
        e.grad = None
        (0.5 * (model(X) - Y).square().sum()).backward()
        put(e, e - grad(e) / squares.max())
    close(e, best, 1e-8)


def test_5_is_lora_xs_with_a_diagonal_core():
    x, g = randn(9, N, seed=1), randn(9, M, seed=2)
    model, _, p, e, *_ = generic()
    other, _, q = adapted(rw.catalog.lora_xs(rank=3), linear(M, N))
    put(q.roles()["R"], torch.diag(e.detach() / p.S))
    close(model(x), other(x), 1e-12)
    backward(model, x, g)
    backward(other, x, g)
    close(grad(e), grad(q.roles()["R"]).diagonal() / p.S, 1e-10)  # the chain rule of R = diag(e / σ)


def test_5_is_the_spectrum_part_of_soda():
    # SODA from its definition with Q = I and no ReLU: U diag(σ + δ) Vᵀ, one δ per singular value.
    x = randn(9, N, seed=1)
    model, _, _, e, _, U, S, Vh = generic(None)
    put(e, e - 2 * S * torch.tensor([0, 1, 0, 0, 1], dtype=DOUBLE))
    assert (S + e).min() < 0  # a ReLU would show
    close(model(x), F.linear(x, outer_sum(U, S + e.detach(), Vh), model.layer.bias), 1e-12)


def test_6_orthogonal_changes_of_basis_keep_the_trajectory():
    P, Q = torch.linalg.qr(randn(M, M, seed=3))[0], torch.linalg.qr(randn(N, N, seed=4))[0]
    X, Y = randn(20, N, seed=1), randn(20, M, seed=2)
    trajectories = []
    for rotated in (False, True):
        layer = linear(M, N, bias=False)
        if rotated:
            put(layer.weight, P @ layer.weight.detach() @ Q)
        x, y = (X @ Q, Y @ P.t()) if rotated else (X, Y)  # W x -> P W Q (Qᵀ x)
        model, _, p = adapted(svfit(rank=3), layer)
        e, points = p.roles()["increment"], []
        for _ in range(5):
            e.grad = None
            (model(x) - y).square().mean().backward()
            put(e, e - 0.1 * grad(e))
            points.append(e.detach().clone())
        trajectories.append(torch.stack(points))
    close(trajectories[1], trajectories[0], 1e-10)
    assert trajectories[0][-1].norm() > 0.01


def test_export_at_rank_r_and_merge():
    x = randn(9, N, seed=1)
    model, handle, _, e, W, U, _, Vh = generic()
    pair, before = handle.low_rank_of("layer"), model(x).detach()
    assert pair is not None and pair.rank <= 3
    close(pair.dense(), outer_sum(U, e.detach(), Vh), 1e-12)
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)


def test_convolution_decomposes_the_reshaped_kernel():
    layer, x = nn.Conv2d(3, 4, 3, stride=2, padding=1).to(DOUBLE), randn(2, 3, 8, 8, seed=1)
    W = layer.weight.detach().clone()
    U, _, Vh = torch.linalg.svd(W.reshape(4, -1), full_matrices=False)
    model, handle, p = adapted(svfit(rank=2), layer)
    fill(handle)
    kernel = W + outer_sum(U, p.roles()["increment"].detach(), Vh).reshape(W.shape)
    close(model(x), F.conv2d(x, kernel, layer.bias, stride=2, padding=1), 1e-12)
