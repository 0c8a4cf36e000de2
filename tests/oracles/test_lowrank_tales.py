"""Alternating least squares and LoKH against their spec (arXiv:2408.05883): plain, ridge and masked factorizations, the nearest
Kronecker, Khatri-Rao and Hadamard products, and the adapter whose update is a column-wise Khatri-Rao product of factors.

The spec lists its oracles without numbers; they are numbered here in its order.
"""

import itertools

import pytest
import torch

import rankwise as rw
from rankwise.approximations.alternating import als, hadamard_als, nearest_khatri_rao, nearest_kronecker
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tail(matrix, rank):
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


def khatri_rao(*factors):
    """Column k is the Kronecker product of the k-th columns; row index (i_1, i_2, …) with the last one fastest."""
    rows = itertools.product(*[range(factor.shape[0]) for factor in factors])
    return torch.stack([torch.stack([f[i] for f, i in zip(factors, index, strict=True)]).prod(0) for index in rows])


@pytest.mark.parametrize("shape", [(10, 8), (8, 10)])
def test_1_plain_als_falls_to_the_svd(shape):
    T = randn(*shape, seed=1)
    values = []
    for sweeps in (1, 2, 3, 5, 10, 30, 400):
        found = als(T, 3, iterations=sweeps, tolerance=0.0, generator=generator(2))
        assert found.B.shape == (shape[0], 3) and found.A.shape == (3, shape[1])
        values.append(float((found.dense() - T).square().sum()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(values))
    assert values[0] > values[-1] >= tail(T, 3) * (1 - 1e-12)
    assert values[-1] == pytest.approx(tail(T, 3), rel=1e-8)


def test_1_each_factor_solves_its_least_squares():
    T = randn(10, 8, seed=1)
    found = als(T, 3, iterations=400, tolerance=0.0, generator=generator(2))
    B, A = found.folded().B, found.folded().A
    close(torch.linalg.lstsq(B, T).solution, A, 1e-6)
    close(torch.linalg.lstsq(A.t(), T.t()).solution.t(), B, 1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_2_everything_observed_is_plain_als(ridge):
    T = randn(9, 7, seed=3)
    plain = als(T, 2, ridge=ridge, iterations=20, tolerance=0.0, generator=generator(4))
    everything = torch.ones(9, 7, dtype=torch.bool)
    masked = als(T, 2, ridge=ridge, observed=everything, iterations=20, tolerance=0.0, generator=generator(4))
    close(masked.dense(), plain.dense(), 1e-10)


def test_2_missing_entries_are_recovered():
    """From a random start it can run away instead (4 of 30 starts here did), which the observed entries tell."""
    T = randn(20, 2, seed=5) @ randn(2, 20, seed=6)
    observed = torch.rand(20, 20, generator=generator(7)) < 0.6
    damaged = torch.where(observed, T, torch.full_like(T, 1e6))  # what is not observed must not be read
    tries = [
        als(damaged, 2, ridge=1e-9, observed=observed, iterations=40, tolerance=0.0, generator=generator(k)) for k in range(4)
    ]
    best = min(tries, key=lambda found: float((found.dense() - T)[observed].norm()))
    close(best.dense(), T, 1e-4)


def test_2_a_missing_entry_changes_the_solution():
    """The masked normal equations of one column and one row, at a fixed point."""
    T, observed = randn(8, 6, seed=9), torch.rand(8, 6, generator=generator(10)) < 0.8
    ridge = 0.5
    found = als(T, 2, ridge=ridge, observed=observed, iterations=300, tolerance=0.0, generator=generator(11)).folded()
    eye = ridge * torch.eye(2, dtype=torch.float64)
    for j in range(6):
        B = found.B[observed[:, j]]
        close(torch.linalg.solve(B.t() @ B + eye, B.t() @ T[observed[:, j], j]), found.A[:, j], 1e-5)
    for i in range(8):
        A = found.A[:, observed[i]]
        close(torch.linalg.solve(A @ A.t() + eye, A @ T[i, observed[i]]), found.B[i], 1e-5)


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("ridge", [0.3, 0.8])
def test_3_ridge_is_a_soft_threshold(rank, ridge):
    T = randn(7, 6, seed=12)
    U, S, Vh = torch.linalg.svd(T, full_matrices=False)
    shrunk = (S[:rank] - ridge).clamp_min(0)
    found = als(T, rank, ridge=ridge, iterations=3000, tolerance=0.0, generator=generator(13))
    close(found.dense(), (U[:, :rank] * shrunk) @ Vh[:rank], 1e-5)


@pytest.mark.parametrize("left", [(2, 3), (6, 2), (4, 1), (1, 12)])
def test_4_kronecker_product_is_recovered(left):
    B, C = randn(*left, seed=14), randn(12 // left[0], 12 // left[1], seed=15)
    found_left, found_right = nearest_kronecker(torch.kron(B, C), left)
    assert tuple(found_left.shape) == left and found_right.shape == C.shape
    close(torch.kron(found_left, found_right), torch.kron(B, C), 1e-10)


@pytest.mark.parametrize("left", [(2, 3), (3, 2), (4, 6)])
def test_4_nearest_kronecker_product_of_a_generic_matrix(left):
    T = randn(12, 12, seed=16)
    p, q = 12 // left[0], 12 // left[1]
    blocks = [T[i * p : (i + 1) * p, j * q : (j + 1) * q].flatten() for i in range(left[0]) for j in range(left[1])]
    found = torch.kron(*nearest_kronecker(T, left))
    assert float((T - found).square().sum()) == pytest.approx(tail(torch.stack(blocks), 1), rel=1e-10)


@pytest.mark.parametrize("sizes", [(3, 4), (2, 6), (6, 2)])
def test_5_nearest_khatri_rao_product_column_by_column(sizes):
    T = randn(12, 5, seed=17)
    factors = nearest_khatri_rao(T, sizes)
    assert [tuple(factor.shape) for factor in factors] == [(size, 5) for size in sizes]
    found = khatri_rao(*factors)
    for k in range(5):
        U, S, Vh = torch.linalg.svd(T[:, k].reshape(sizes))
        close(found[:, k].reshape(sizes), S[0] * torch.outer(U[:, 0], Vh[0]), 1e-10)
    F, G = randn(sizes[0], 5, seed=18), randn(sizes[1], 5, seed=19)
    close(khatri_rao(*nearest_khatri_rao(khatri_rao(F, G), sizes)), khatri_rao(F, G), 1e-10)


def lokh(m, n, *, factors=2, generic=True):
    layer = linear(m, n)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, handle, p = adapted(rw.catalog.lowrank_tales(factors=factors), layer)
    if generic:
        fill(handle)
    return model, handle, [p.roles()[f"F_{k + 1}"] for k in range(factors)], W, b


def test_6_rank_of_the_update():
    _, handle, factors, _, _ = lokh(16, 12)
    assert [tuple(factor.shape) for factor in factors] == [(4, 12), (4, 12)]
    assert [int(torch.linalg.matrix_rank(factor)) for factor in factors] == [4, 4]
    assert int(torch.linalg.matrix_rank(handle.update_of("layer").dense())) == 12
    assert handle.trained_numbers == 12 * (4 + 4)


@pytest.mark.parametrize(("m", "factors"), [(16, 2), (12, 2), (27, 3), (24, 3)])
def test_7_the_layer_applies_the_khatri_rao_product(m, factors):
    model, handle, tensors, W, b = lokh(m, 5, factors=factors)
    x = randn(9, 5, seed=1)
    sizes = [tensor.shape[0] for tensor in tensors]
    assert torch.tensor(sizes).prod() == m and all(tensor.shape[1] == 5 for tensor in tensors)
    close(handle.update_of("layer").dense(), khatri_rao(*tensors), 1e-12)
    y = model(x) - x @ W.t() - b
    close(y, x @ khatri_rao(*tensors).t(), 1e-10)
    if factors == 2:  # (F ⊙ G) x = F diag(x) Gᵀ, row after row
        F, G = tensors
        for row, one in zip(y, x, strict=True):
            close(row, ((F * one) @ G.t()).flatten(), 1e-10)


def test_7_start_and_gradients():
    layer, x = linear(12, 5), randn(9, 5, seed=1)
    base = layer(x).detach()
    model, handle, factors, *_ = lokh(12, 5, generic=False)
    assert torch.equal(model(x), base) and not handle.update_of("layer").dense().any()
    assert sum(bool(factor.any()) for factor in factors) == 1  # one factor is zero; with two nothing would ever move
    g = randn(9, 12, seed=2)
    backward(model, x, g)
    assert sum(bool(grad(factor).any()) for factor in factors) == 1
    fill(handle)
    G = backward(model, x, g).reshape(factors[0].shape[0], factors[1].shape[0], 5)
    close(grad(factors[0]), torch.einsum("ijk,jk->ik", G, factors[1]), 1e-12)
    close(grad(factors[1]), torch.einsum("ijk,ik->jk", G, factors[0]), 1e-12)


def test_7_scaling_one_factor_scales_the_update():
    _, handle, factors, _, _ = lokh(12, 5)
    before = handle.update_of("layer").dense().detach()
    put(factors[0], 3 * factors[0])
    put(factors[1], factors[1] / 2)
    close(handle.update_of("layer").dense(), 1.5 * before, 1e-12)


def hadamard_objective(T, *tensors):
    B1, A1, B2, A2 = tensors
    return ((B1 @ A1) * (B2 @ A2) - T).square().sum()


def hadamard(T, rank1, rank2, sweeps, seed=21):
    """B1, A1, B2, A2 of (B1 A1) ∘ (B2 A2)."""
    first, second = hadamard_als(T, rank1, rank2, iterations=sweeps, tolerance=0.0, generator=generator(seed))
    assert (first.rank, second.rank) == (rank1, rank2)
    return [tensor.detach().clone() for pair in (first.folded(), second.folded()) for tensor in (pair.B, pair.A)]


def test_8_hadamard_als_falls_to_where_no_factor_improves():
    """The definition's (C₁ D₁) ∘ (C₂ D₂): no closed form, so it is monotone, and the factor solved last is stationary."""
    T, values, slopes = randn(8, 7, seed=20), [], []
    for sweeps in (1, 2, 4, 8, 20, 150):
        tensors = [tensor.requires_grad_() for tensor in hadamard(T, 2, 2, sweeps)]
        loss = hadamard_objective(T, *tensors)
        gradients = torch.autograd.grad(loss, tensors)
        values.append(loss.item())
        slopes.append([float(g.norm() * t.detach().norm()) / loss.item() for g, t in zip(gradients, tensors, strict=True)])
    assert all(later <= earlier * (1 + 1e-10) for earlier, later in itertools.pairwise(values))
    assert values[0] > 1.1 * values[-1]
    assert all(min(slope) < 1e-9 for slope in slopes) and max(slopes[-1]) < 0.1 * max(slopes[0])
    B1, A1, B2, A2 = tensors
    assert int(torch.linalg.matrix_rank((B1 @ A1) * (B2 @ A2), rtol=1e-9)) == 4  # r1 r2


def test_8_hadamard_with_a_factor_of_rank_one_is_the_svd():
    """A second factor of rank 1 only scales rows and columns, so the optimum is that of rank r1."""
    T = randn(8, 7, seed=20)
    assert float(hadamard_objective(T, *hadamard(T, 3, 1, 150))) == pytest.approx(tail(T, 3), rel=1e-6)
