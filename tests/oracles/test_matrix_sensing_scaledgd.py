"""ScaledGD(λ) for over-parameterized sensing against its spec (arXiv:2302.01186)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rankwise
from rankwise.core.operators import LowRank
from rankwise.problems import generators, problem, scaled, solve
from rankwise.problems.problem import Problem
from rankwise.problems.trace import Trace
from tests.oracles.tools_training import normal, orthonormal, relative


def instance(condition: float, seed: int = 0) -> Problem:
    return generators.sensing(m=20, rank=2, condition=condition, measurements=800, symmetric=True, seed=seed)


def run(target: Problem, damping: float, iterations: int = 600, *, seed: int = 0) -> Trace:
    return scaled.sensing_scaledgd(target, rank=4, damping=damping, lr=0.3, alpha=1e-6, iterations=iterations, seed=seed)


def plain(target: Problem, iterations: int) -> Trace:
    return solve.solve(
        target, rank=4, init="small", lr=0.3, alpha=1e-6, iterations=iterations, every=iterations // 4, symmetric=True
    )


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_1_iterations_do_not_grow_with_the_condition_number(condition: float) -> None:
    """The spec's own draw took 16/16/12 iterations to 1e-2 and 69/94/35 to 1e-4.

    Five other draws take 12 to 19 to 1e-2; the tail to 1e-4 depends on the draw (36 to over 150 at κ = 1), so what is asked
    of it is half as many again as the spec's worst.
    """
    trace = run(instance(condition), 0.02 / condition, 150)
    coarse, fine = trace.iterations_to(1e-2), trace.iterations_to(1e-4)
    assert coarse is not None
    assert coarse <= 24
    assert fine is not None
    assert fine <= 141


def test_1_plain_descent_slows_down() -> None:
    assert plain(instance(1.0), 200).error[-1] < 1e-4
    assert plain(instance(10.0), 240).error[-1] > 1e-2  # 466 iterations in the spec
    assert plain(instance(100.0), 600).error[-1] > 1e-2  # never within 600


@pytest.mark.parametrize(
    ("factor", "low", "high"), [(1e-4, 0, 1e-7), (1e-2, 1e-7, 5e-6), (1.0, 5e-6, 1e-3), (100.0, 9e-3, 0.02)]
)
def test_2_final_error_grows_with_damping(factor: float, low: float, high: float) -> None:
    """7e-9, 6e-7, 4e-5, .0102 in the spec: disjoint ranges here. The last one is descent, which never finds 0.01 beside 1."""
    target = instance(100.0)
    trace = solve.solve(
        target,
        rank=4,
        init="small",
        step=rankwise.compose(f"lora + sgd + scaled_gd(damping={factor * 0.01})").steps(),
        lr=0.3,
        alpha=1e-6,
        iterations=600,
        every=600,
        symmetric=True,
    )
    assert low <= trace.error[-1] < high


def solved(X: torch.Tensor, target: Problem, damping: float, lr: float = 0.3, iterations: int = 30) -> torch.Tensor:
    return solve.solve(
        target,
        rank=X.shape[1],
        init=LowRank(X, X.T.clone()),
        step=rankwise.compose(f"lora + sgd + scaled_gd(damping={damping})").steps(),
        lr=lr,
        iterations=iterations,
        every=iterations,
        symmetric=True,
    ).factors.B.detach()


def test_3_orthogonal_change_of_the_start_is_followed() -> None:
    X, T = normal(0, 20, 2), orthonormal(1, 2, 2)
    target = instance(10.0)
    assert relative(solved(X @ T, target, 0.0), solved(X, target, 0.0) @ T) < 1e-12


def test_3_any_invertible_change_of_an_asymmetric_pair_is_followed() -> None:
    target = generators.sensing(m=12, n=10, rank=2, measurements=400, symmetric=False)
    B, A, Q = normal(2, 12, 2), normal(3, 2, 10), normal(4, 2, 2)
    found = []
    for start in ((B, A), (B @ Q, torch.linalg.inv(Q) @ A)):
        trace = solve.solve(
            target,
            rank=2,
            init=LowRank(*start),
            step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
            lr=0.3,
            iterations=30,
        )
        found.append((trace.factors.B.detach(), trace.factors.A.detach()))
    assert relative(found[1][0], found[0][0] @ Q) < 1e-9
    assert relative(found[1][1], torch.linalg.inv(Q) @ found[0][1]) < 1e-9


def test_4_large_damping_is_descent() -> None:
    """η/λ fixed: the difference is of the order ‖X‖²/λ, below the spec's 1e-8 from λ = 1e10 on."""
    target, X, damping = instance(10.0), 0.5 * normal(5, 20, 4), 1e11
    found = solved(X, target, damping, lr=0.1 * damping)
    expected = X.clone()
    for _ in range(30):
        expected = expected - 0.1 * target.gradient(expected @ expected.T) @ expected
    assert relative(found, expected) < 1e-8


def test_5_population_iterates_stay_in_the_span() -> None:
    target = generators.factorization(m=20, rank=2, symmetric=True)
    X0 = 0.1 * normal(6, 20, 3)
    span = torch.linalg.qr(torch.cat([X0, torch.linalg.eigh(target.truth)[1][:, -2:]], dim=1))[0]
    for iterations in (1, 5, 20, 60):
        X = solved(X0, target, 0.005, iterations=iterations)
        assert relative(span @ (span.T @ X), X) < 1e-12


def test_5_fixed_points_are_truncations() -> None:
    spectrum = [1.0, 0.6, 0.2]
    target = generators.factorization(m=20, rank=3, spectrum=spectrum, symmetric=True)
    values, vectors = torch.linalg.eigh(target.truth)
    for chosen in ([-1], [-1, -2], [-2], [-1, -3]):  # every choice is stationary, the leading ones attract
        X = vectors[:, chosen] * values[chosen].sqrt()
        assert relative(solved(X, target, 0.01, iterations=1), X) < 1e-12
    for rank in (1, 2):
        X = solved(0.3 * normal(7, 20, rank), target, 0.01, iterations=300)
        best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        assert relative(X @ X.T, best) < 1e-6


def test_6_tail_falls_slowly() -> None:
    """The tail is slow for λ below σ_min. "Monotone in λ" holds on the spec's instance (oracle 2), not in general.

    Plain float64 iterations from the formula at κ = 10, 600 of them, end at 6.5e-7, 4.1e-5, 1.2e-8 for λ = 1e-3, 1e-1, 1 times
    σ_min (another draw: 7.1e-7, 2.7e-5, 4.0e-9): the largest λ ends lowest, because it lets the superfluous directions grow so
    little from α. So the library is compared with those iterations instead.
    """
    target, X0, last = instance(10.0, 1), 1e-6 * normal(1, 20, 4) / 20**0.5, {}
    eye = torch.eye(4, dtype=torch.float64)
    for factor in (1e-3, 1e-1, 1.0):
        X, damping, early = X0.clone(), factor * 0.1, 0.0
        for iteration in range(200):
            if iteration == 100:
                early = target.relative_error(X @ X.T)
            G = target.gradient(X @ X.T)
            X = X - 0.3 * G @ X @ torch.linalg.inv(X.T @ X + damping * eye)
        found = solved(X0, target, damping, iterations=200)
        last[factor] = target.relative_error(found @ found.T)
        assert last[factor] == pytest.approx(target.relative_error(X @ X.T), rel=1e-2)
        assert last[factor] <= early
        if factor < 1:
            assert last[factor] > early / 100  # far from the linear phase's rate, (1 - η)^100
    assert last[1.0] < last[1e-3] < last[1e-1]


def test_definition_update_against_brute_force() -> None:
    target, damping, lr = instance(10.0), 0.02, 0.3
    X = 0.3 * normal(8, 20, 4)
    expected = X.clone()
    eye = torch.eye(4, dtype=torch.float64)
    for _ in range(20):
        G = target.gradient(expected @ expected.T)
        expected = expected - lr * G @ expected @ torch.linalg.inv(expected.T @ expected + damping * eye)
    assert relative(solved(X, target, damping, iterations=20), expected) < 1e-9


def test_definition_adjoint_and_gradient() -> None:
    """G = 𝒜*(𝒜(XXᵀ) - y) through the operator's own rows."""
    target = instance(10.0)
    X = normal(9, 20, 4)
    rows = torch.stack([target.measurement.forward(E) for E in torch.eye(400, dtype=torch.float64).reshape(400, 20, 20)], dim=1)
    residual = rows @ (X @ X.T).reshape(-1) - rows @ target.truth.reshape(-1)
    assert relative(target.gradient(X @ X.T), (rows.T @ residual).reshape(20, 20)) < 1e-10
    assert problem.factorizing(target.truth, symmetric=True).rank == 2
    assert np.isfinite(target.isometry_defect(2, draws=20))
