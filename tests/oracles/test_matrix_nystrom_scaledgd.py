"""Oracles of the Nyström start with ScaledGD, on 30 × 25 matrices with singular values 100, 10, 1, 0.1.

Where the specification measured one draw, the claim behind the figure is tested, with the margin stated.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.problems.problem import factorizing
from rankwise.problems.solve import solve
from rankwise.problems.starts import start_of
from rankwise.steps.scaled_gd import scaled_gd

VALUES = torch.tensor([100, 10, 1, 0.1], dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def asymmetric() -> Tensor:
    U, V = torch.linalg.qr(draw(0, 30, 4)).Q, torch.linalg.qr(draw(1, 25, 4)).Q
    return (U * VALUES) @ V.T


def symmetric(size: int = 25) -> Tensor:
    """XXᵀ with the singular values above, and its range."""
    Q = torch.linalg.qr(draw(1, size, 4)).Q
    return (Q * VALUES) @ Q.T


def absolute_errors(trace, M: Tensor) -> list[float]:
    return [float(value) * M.norm().item() for value in trace.error]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [4, 6])
def test_1_one_step_is_enough(seed, rank):
    """η = 1: measured 2.8e-11 for ‖M‖ = 100; ten times that for any sketch, and for more columns than the rank."""
    M = asymmetric()
    trace = rw.catalog.matrix_nystrom_scaledgd(M, rank=rank, iterations=1, seed=seed)
    assert absolute_errors(trace, M)[0] == pytest.approx(M.norm().item())
    assert absolute_errors(trace, M)[1] < 2.8e-10
    assert (trace.factors.dense() - M).norm() < 2.8e-10


def test_1_the_first_step_projects_onto_the_range_of_the_sketch():
    """B₀A₁ = η P M, P onto range(M Ω), for any rank and η; B does not move while A = 0."""
    M = asymmetric()
    for rank, lr in ((2, 1.0), (3, 0.4), (1, 0.9)):
        start = start_of(factorizing(M), rank, "nystrom", seed=3)
        assert not start.A.any()
        P = start.B @ torch.linalg.pinv(start.B)
        trace = solve(factorizing(M), rank=rank, init="nystrom", step=scaled_gd(damping=0.0), lr=lr, iterations=1, seed=3)
        assert torch.equal(trace.factors.B, start.B)
        assert (trace.factors.dense() - lr * P @ M).norm() < 1e-10 * M.norm()
        assert ((M - P @ M).norm() / M.norm()).item() > 1e-4
        assert (P @ M - M).norm() >= math.sqrt(VALUES[rank:].square().sum().item()) * (1 - 1e-12)


def test_2_half_steps_are_first_super_linear_then_halving():
    """η = ½: .5, .125, 3.5e-3, 3.0e-6, 8.5e-12: p <- 1 + (p - 1)²/(4p) for the share p of M that is there, until rounding."""
    trace = rw.catalog.matrix_nystrom_scaledgd(asymmetric(), rank=4, lr=0.5, iterations=25)
    share, expected = 0.5, [1.0, 0.5]
    for _ in range(3):
        share = 1 + (share - 1) ** 2 / (4 * share)
        expected.append(abs(share - 1))
    assert expected[1:] == pytest.approx([0.5, 0.125, 3.5e-3, 3.0e-6], rel=0.02)
    assert trace.error[:5].tolist() == pytest.approx(expected, rel=1e-4)
    assert trace.error[5] < 10 * 8.5e-12
    for sooner, later in itertools.pairwise(trace.error[5:].tolist()):  # halving at least, until nothing is left
        assert later < 0.51 * sooner or later < 5e-16


@pytest.mark.parametrize("seed", range(3))
def test_3_the_symmetric_iteration_is_newtons(seed):
    """η = ½: measured 113, 28, 6.8, 1.5, .22, .0105, 3.6e-5, 1.4e-8, then rounding that halves in each step."""
    M = symmetric()
    Q = torch.linalg.svd(M).U[:, :4]
    S = Q.T @ M @ Q
    trace = rw.catalog.matrix_nystrom_scaledgd(M, rank=4, iterations=40, symmetric=True, seed=seed)
    start = start_of(factorizing(M, symmetric=True), 4, "nystrom", symmetric=True, seed=seed)
    Phi = Q.T @ start.B
    errors, expected = absolute_errors(trace, M), []
    for _ in range(40):
        expected.append((Phi @ Phi.T - S).norm().item())
        Phi = 0.5 * Phi + 0.5 * S @ torch.linalg.inv(Phi).T
    falling = [i for i, value in enumerate(expected) if value > 1e-5]
    assert len(falling) >= 5
    for i in falling:
        assert errors[i] == pytest.approx(expected[i], rel=1e-4)
    small = [i for i in falling if errors[i] < 1e-2]
    for i in small:  # P+ - S = ¼ (P - S) P⁻¹ (P - S), P = ΦΦᵀ, whose inverse is 1/0.1 at most: the error is squared
        assert errors[i + 1] < 3 * errors[i] ** 2 + 1e-8
    arrived = next(i for i, value in enumerate(errors) if value < 1e-7)
    assert max(errors[arrived + 1 :]) < 1e-7
    for sooner, later in itertools.pairwise(errors[arrived + 1 :]):
        assert later < 0.55 * sooner or later < 1e-12
    assert errors[-1] < 1e-12


def test_3_other_step_sizes_are_linear():
    """η = 0.3: 1 - 2η = 0.40 per step."""
    trace = rw.catalog.matrix_nystrom_scaledgd(symmetric(), rank=4, lr=0.3, iterations=60, symmetric=True)
    tail = [later / sooner for sooner, later in itertools.pairwise(trace.error.tolist()) if 1e-8 < later < 1e-5]
    assert len(tail) >= 5
    assert tail == pytest.approx([0.40] * len(tail), abs=0.005)


def test_4_a_small_random_start_only_halves():
    """Parts outside of range(M) shrink by 1 - η, so the product's cross terms by ½ for η = ½."""
    M = symmetric()
    problem = factorizing(M, symmetric=True)
    X = 1e-2 * draw(5, 25, 4)
    trace = solve(problem, rank=4, init=rw.LowRank(X, X.T), step=scaled_gd(damping=0.0), lr=0.5, iterations=50)
    tail = [later / sooner for sooner, later in itertools.pairwise(trace.error.tolist()) if 1e-11 < later < 1e-7]
    assert len(tail) >= 8
    assert tail[-6:] == pytest.approx([0.50] * 6, abs=0.005)
    nystrom = rw.catalog.matrix_nystrom_scaledgd(M, rank=4, iterations=50, symmetric=True)
    assert nystrom.iterations_to(1e-10) < trace.iterations_to(1e-10)


@pytest.mark.parametrize("lr", [0.5, 0.8])
def test_5_too_few_columns_end_at_the_best_truncation(lr):
    M = asymmetric()
    best = math.sqrt(VALUES[2:].square().sum().item())
    assert best == pytest.approx(1.0049875621, abs=1e-10)
    trace = rw.catalog.matrix_nystrom_scaledgd(M, rank=2, lr=lr, iterations=300)
    assert absolute_errors(trace, M)[-1] == pytest.approx(1.0049875621, abs=1e-9)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    assert (trace.factors.dense() - (U[:, :2] * S[:2]) @ Vh[:2]).norm() < 1e-6


@pytest.mark.parametrize("s", [0.1, 1.0, 7.0])
def test_6_the_scalar_case_is_the_babylonian_root(s):
    phi = 3.0
    for iterations in range(1, 8):
        phi = (phi + s / phi) / 2
        start = torch.tensor([[3.0]], dtype=torch.float64)
        problem = factorizing(torch.tensor([[s]], dtype=torch.float64), symmetric=True)
        step = scaled_gd(damping=0.0)
        trace = solve(problem, rank=1, init=rw.LowRank(start, start), step=step, lr=0.5, iterations=iterations)
        assert trace.factors.B.item() == pytest.approx(phi, rel=1e-13)
    assert phi == pytest.approx(math.sqrt(s), rel=1e-6)


@pytest.mark.parametrize("c", [1e-3, 4.0, 1e5])
def test_7_the_size_of_the_target_does_not_matter(c):
    """M -> c M with the same Ω: the same relative errors, asymmetric. (A symmetric start c M Ω against a root √c: no.)"""
    M = asymmetric()
    one = rw.catalog.matrix_nystrom_scaledgd(M, rank=4, lr=0.5, iterations=4, seed=2)
    other = rw.catalog.matrix_nystrom_scaledgd(c * M, rank=4, lr=0.5, iterations=4, seed=2)
    assert other.error.tolist() == pytest.approx(one.error.tolist(), rel=1e-4)
    two = rw.catalog.matrix_nystrom_scaledgd(M, rank=2, lr=0.5, iterations=20, seed=2)
    same = rw.catalog.matrix_nystrom_scaledgd(c * M, rank=2, lr=0.5, iterations=20, seed=2)
    assert same.error.tolist() == pytest.approx(two.error.tolist(), rel=1e-9)


@pytest.mark.parametrize("form", ["symmetric", "asymmetric"])
def test_7_iterates_stay_in_the_range_of_the_target(form):
    M = symmetric() if form == "symmetric" else asymmetric()
    Q = torch.linalg.svd(M).U[:, :4]
    for iterations in (1, 2, 5, 12):
        trace = rw.catalog.matrix_nystrom_scaledgd(M, rank=4, lr=0.5, iterations=iterations, symmetric=form == "symmetric")
        B = trace.factors.B
        assert (B - Q @ (Q.T @ B)).norm() < 1e-10 * B.norm()


def test_an_operator_is_enough():
    """Only products with M are asked for: factors in place of the matrix give the same run."""
    U, V = torch.linalg.qr(draw(0, 30, 4)).Q, torch.linalg.qr(draw(1, 25, 4)).Q
    dense = rw.catalog.matrix_nystrom_scaledgd(asymmetric(), rank=3, lr=0.5, iterations=10, seed=1)
    factors = rw.catalog.matrix_nystrom_scaledgd(rw.LowRank(U * VALUES, V.T), rank=3, lr=0.5, iterations=10, seed=1)
    assert factors.error.tolist() == pytest.approx(dense.error.tolist(), rel=1e-9)


def test_7_but_it_does_matter_in_the_symmetric_form():
    """c M Ω against the root √c M^½: the sketch is √c times too large, and the transient grows with it."""
    M = symmetric()
    one = rw.catalog.matrix_nystrom_scaledgd(M, rank=4, iterations=12, symmetric=True, seed=2)
    other = rw.catalog.matrix_nystrom_scaledgd(100 * M, rank=4, iterations=12, symmetric=True, seed=2)
    assert other.error[0] > 50 * one.error[0]
    assert other.error.max() > 10 * one.error.max()
