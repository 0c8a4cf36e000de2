"""Oracles of LoLDU: W' = W + s·P L_r diag(z - z₀) U_r from the pivoted LU decomposition W = P L diag(D) U, s = α/r.

`lower` is P L_r (rows already permuted), so the test needs no permutation but the reference's own.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, close, fill, grad, linear, put, randn

loldu = rw.catalog.loldu
SIZES = [(7, 5), (5, 7), (6, 6)]


def decomposed(W):
    """(P, L, D, U) with U of unit diagonal: W = P L diag(D) U."""
    P, L, upper = torch.linalg.lu(W)
    D = upper.diagonal()
    return P, L, D, upper / D[:, None]


def build(m=7, n=5, *, seed=0, **options):
    """(model, handle, parameterization, z, W)."""
    layer = linear(m, n, seed=seed)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(loldu(**options), layer)
    return model, handle, p, p.roles()["diagonal"], W


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_1_reconstruction(m, n):
    _, handle, p, z, W = build(m, n)
    k = min(m, n)
    P, L, D, U = decomposed(W)
    assert p.lower.shape == (m, k) and p.upper.shape == (k, n) and z.shape == p.diagonal_start.shape == (k,)
    close((p.lower * p.diagonal_start) @ p.upper, W, 1e-12)
    close(p.lower, P @ L, 1e-12)
    close(p.upper, U, 1e-12)
    close(p.diagonal_start, D, 1e-12)
    # unit lower-trapezoidal after undoing the permutation, unit upper
    assert torch.equal((P.t() @ p.lower).triu(1), torch.zeros(m, k, dtype=DOUBLE))
    assert torch.equal(p.upper.tril(-1), torch.zeros(k, n, dtype=DOUBLE))
    assert handle.trained_numbers == k


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("start", ["lu", "constant", "normal", "uniform"])
def test_2_every_start_is_the_base(start, rank):
    x = randn(9, 5, seed=1)
    model, handle, p, z, W = build(rank=rank, start=start, alpha=20.0)
    base = F.linear(x, W, model.layer.bias)
    assert torch.equal(z, p.diagonal_start)
    close(model(x), base, 1e-14)
    assert handle.update_of("layer").dense().norm() < 1e-6 * W.norm()
    D = decomposed(W)[2][: rank or 5]
    match start:
        case "lu":
            close(z, D, 1e-12)
        case "constant":
            close(z, D.mean().expand_as(D), 1e-12)
        case "normal":
            assert (z - D.mean()).abs().max() < 6 * D.std() and z.std() > 0 and not torch.allclose(z, D)
        case "uniform":
            assert z.abs().max() <= abs(D.mean()) / 2 and z.std() > 0
    put(z, z + 1.0)  # away from the start the layer must move
    assert (model(x) - base).norm() > 0.1


@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_2_drawn_starts_have_the_stated_distribution(start):
    # 40 pivots: the mean of the draws is within 4.5 standard errors, their spread within a factor.
    _, _, _, z, W = build(40, 40, start=start)
    D = decomposed(W)[2]
    mean, spread = (D.mean(), D.std()) if start == "normal" else (0.0, abs(D.mean()) / math.sqrt(12))
    assert abs(float(z.detach().mean() - mean)) < 4.5 * float(spread) / math.sqrt(40)
    assert 0.6 < float(z.detach().std() / spread) < 1.5


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_3_the_residual_is_the_schur_complement(m, n):
    model, _, _, z, W = build(m, n, rank=3, alpha=3.0)  # s = 1
    put(z, 0.0)  # then W' = W_res
    residual = rw.effective_weights(model)["layer.weight"].detach()
    P = decomposed(W)[0]
    assert (P.t() @ residual)[:3].abs().max() < 1e-12
    assert residual[:, :3].abs().max() < 1e-12
    assert torch.linalg.matrix_rank(residual, rtol=1e-10) == torch.linalg.matrix_rank(W) - 3


@pytest.mark.parametrize("rank", [3, 5])
def test_4_gradient(rank):
    x, g, alpha = randn(11, 5, seed=1), randn(11, 7, seed=2), 2.0
    model, handle, _, z, W = build(rank=rank, alpha=alpha)
    fill(handle)
    P, L, _, U = decomposed(W)
    G, columns = backward(model, x, g), P @ L
    expected = alpha / rank * torch.stack([columns[:, i] @ G @ U[i] for i in range(rank)])
    close(grad(z), expected, 1e-10)


def test_4_least_squares_by_normal_equations():
    X, Y, s = randn(50, 5, seed=1), randn(50, 7, seed=2), 2.0
    model, _, p, z, W = build(rank=3, alpha=3 * s)
    P, L, _, U = decomposed(W)
    columns, rows = (P @ L)[:, :3], X @ U[:3].t()  # (m, r), (T, r)
    normal = s**2 * (columns.t() @ columns) * (rows.t() @ rows)
    right = s * ((Y - F.linear(X, W, model.layer.bias)) @ columns * rows).sum(0)
    assert (columns.t() @ columns - torch.diag((columns.t() @ columns).diagonal())).norm() > 0.1  # not an orthogonal basis
    best = p.diagonal_start + torch.linalg.solve(normal, right)
    put(z, best)
    (0.5 * (model(X) - Y).square().sum()).backward()
    assert grad(z).norm() < 1e-9 * right.norm()
    optimum = float((model(X) - Y).detach().square().sum())
    put(z, p.diagonal_start)
    rate = float(torch.linalg.eigvalsh(normal)[-1])
    for _ in range(int(25 * torch.linalg.cond(normal))):
        z.grad = None
        (0.5 * (model(X) - Y).square().sum()).backward()
        put(z, z - grad(z) / rate)
    close(z, best, 1e-8)
    assert float((model(X) - Y).detach().square().sum()) <= optimum * (1 + 1e-10)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_5_a_multiple_of_the_pivots_scales_the_weight(m, n):
    model, _, p, z, W = build(m, n, alpha=float(min(m, n)))  # s = 1
    put(z, 2.5 * p.diagonal_start)
    close(rw.effective_weights(model)["layer.weight"], 2.5 * W, 1e-12)


def test_6_permuting_outputs_permutes_the_method():
    x, order = randn(9, 5, seed=1), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    model, handle, p, z, _ = build(rank=3)
    layer = linear(7, 5)
    put(layer.weight, layer.weight.detach()[order])
    put(layer.bias, layer.bias.detach()[order])
    other, _, q = adapted(loldu(rank=3), layer)
    close(q.upper, p.upper, 1e-12)
    close(q.diagonal_start, p.diagonal_start, 1e-12)
    close(q.lower, p.lower[order], 1e-12)
    fill(handle)
    put(q.roles()["diagonal"], z)
    close(other(x), model(x)[:, order], 1e-12)


def test_export_at_rank_r_and_default_scale():
    x = randn(9, 5, seed=1)
    model, handle, _, z, W = build(rank=3)
    fill(handle)
    pair, before = handle.low_rank_of("layer"), model(x).detach()
    assert pair is not None and pair.rank <= 3
    P, L, D, U = decomposed(W)
    delta = ((P @ L)[:, :3] * ((z.detach() - D[:3]) / 3)) @ U[:3]  # s = α/r = 1/3
    close(pair.dense(), delta, 1e-12)
    close(before, F.linear(x, W + delta, model.layer.bias), 1e-12)
    handle.merge_()
    close(model.layer.weight, W + delta, 1e-12)


def test_zero_pivots_make_no_nan():
    layer, x = linear(7, 5), randn(9, 5, seed=1)
    put(layer.weight[:, 2], 0.0)  # a pruned input: an exact zero among the pivots
    base = layer(x).detach()
    try:
        model, handle, _ = adapted(loldu(), layer)
    except rw.RankwiseError:
        return  # refusing with a reason is the other way that the algorithm allows
    close(model(x), base, 1e-6)
    fill(handle)
    assert torch.isfinite(model(x)).all()
