"""The testbed of low-rank matrix problems against its spec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.operators import Dense, LowRank
from rankwise.problems import generators, problem, solve
from tests.oracles.tools_training import normal, orthonormal, relative

KINDS = ["factorization", "sensing", "completion", "robust", "lora_linear"]


def make(kind: str, **options) -> problem.Problem:
    small = {"m": 9, "rank": 2} | ({"measurements": 60} if kind in ("sensing", "robust") else {})
    return rankwise.catalog.matrix_problems(kind, **(small | options))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_1_eckart_young(rank: int) -> None:
    spectrum = [4.0, 2.0, 1.0, 0.1]
    target = make("factorization", m=20, n=15, rank=4, spectrum=spectrum)
    S = torch.tensor(spectrum, dtype=torch.float64)
    expected = float((S[rank:] ** 2).sum().sqrt() / S.norm())
    assert target.best_error(rank) == pytest.approx(expected, rel=1e-10)
    trace = solve.solve(
        target,
        rank=rank,
        init="spectral",
        step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
        lr=0.5,
        iterations=60,
    )
    assert trace.error[-1] == pytest.approx(expected, rel=1e-9)


def test_2_too_few_measurements_fail() -> None:
    """Rank 3 of 60 x 50 has 321 degrees of freedom. 444 entries (rate .15) still fail, .3 succeeds; medians of 3 seeds."""
    found = {}
    for rate in (0.08, 0.15, 0.3):
        errors, counts = [], []
        for seed in range(3):
            target = make("completion", m=60, n=50, rank=3, condition=3.0, rate=rate, seed=seed)
            assert target.degrees_of_freedom(3) == 3 * (60 + 50 - 3) == 321
            trace = solve.solve(
                target,
                rank=3,
                init="spectral",
                step=rankwise.compose("lora + sgd + scaled_gd(damping=1e-6)").steps(),
                lr=0.4,
                iterations=300,
                every=300,
            )
            errors.append(trace.error[-1])
            counts.append(target.measurement.count)
        found[rate] = (np.median(errors), np.median(counts))
    assert found[0.08][1] < 321
    assert not found[0.08][0] < 1e-1  # nor where it diverges
    assert found[0.15][1] > 321
    assert not found[0.15][0] < 1e-2
    assert found[0.3][0] < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_3_gradient_by_differences(kind: str) -> None:
    target = make(kind)
    m, n = target.shape
    at = normal(0, m, n)
    if target.symmetric:
        at = at @ at.T
    G = target.gradient(at)
    for seed in range(5):
        direction = normal(1 + seed, m, n)
        if target.symmetric:  # the gradient is symmetrized; only symmetric directions mean anything
            direction = (direction + direction.T) / 2
        h = 1e-6
        slope = float(target.loss(at + h * direction) - target.loss(at - h * direction)) / (2 * h)
        assert slope == pytest.approx(float((G * direction).sum()), rel=1e-6, abs=1e-6 * float(G.norm()))


@pytest.mark.parametrize("kind", ["factorization", "sensing", "robust"])
def test_3_symmetric_gradient(kind: str) -> None:
    target = make(kind, symmetric=True)
    X = normal(10, 9, 4)
    G = target.gradient(X @ X.T)
    assert relative(G, G.T) < 1e-12
    assert relative(target.truth, target.truth.T) < 1e-12
    assert float(torch.linalg.eigvalsh(target.truth).min()) > -1e-12


@pytest.mark.parametrize("kind", ["factorization", "sensing"])
def test_4_orthogonal_change_of_factors_is_followed(kind: str) -> None:
    target, X, T = make(kind, symmetric=True), 0.3 * normal(11, 9, 3), orthonormal(12, 3, 3)
    traces = [
        solve.solve(target, rank=3, init=LowRank(start, start.T.clone()), lr=0.1, iterations=40, symmetric=True)
        for start in (X, X @ T)
    ]
    assert relative(traces[1].factors.B, traces[0].factors.B.detach() @ T) < 1e-10
    assert np.allclose(traces[1].error, traces[0].error, rtol=1e-10)


@pytest.mark.parametrize("kind", ["factorization", "sensing", "completion", "lora_linear"])
def test_4_orthogonal_change_of_an_asymmetric_pair(kind: str) -> None:
    target = make(kind, symmetric=False) if kind in ("factorization", "sensing") else make(kind)
    m, n = target.shape
    B, A, T = 0.3 * normal(13, m, 3), 0.3 * normal(14, 3, n), orthonormal(15, 3, 3)
    traces = [solve.solve(target, rank=3, init=LowRank(*start), lr=0.1, iterations=40) for start in ((B, A), (B @ T, T.T @ A))]
    assert relative(traces[1].factors.B, traces[0].factors.B.detach() @ T) < 1e-10
    assert relative(traces[1].factors.A, T.T @ traces[0].factors.A.detach()) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_5_dense_and_factored_matrices_are_the_same_to_a_problem(kind: str) -> None:
    target = make(kind)
    m, n = target.shape
    B = normal(16, m, 3)
    A = B.T.clone() if target.symmetric else normal(17, 3, n)
    factored, whole = LowRank(B, A), B @ A
    assert float(target.loss(factored)) == pytest.approx(float(target.loss(whole)), rel=1e-12)
    assert relative(target.gradient(factored), target.gradient(whole)) < 1e-11
    assert target.relative_error(factored) == pytest.approx(target.relative_error(whole), rel=1e-12)


def test_5_solver_results_are_the_same_for_a_target_given_either_way() -> None:
    B, A = normal(18, 12, 2), normal(19, 2, 10)
    traces = [
        solve.solve(problem.factorizing(given, rank=2), rank=2, init="small", alpha=0.1, lr=0.02, iterations=60)
        for given in (LowRank(B, A), Dense(B @ A), B @ A)
    ]
    for trace in traces[1:]:
        assert np.allclose(trace.error, traces[0].error, rtol=1e-10)


def test_6_lora_linear_with_white_inputs_is_factorization() -> None:
    options = {"m": 14, "n": 11, "rank": 3, "condition": 5.0, "seed": 4}
    traces = [
        solve.solve(target, rank=3, init="small", alpha=0.1, lr=0.2, iterations=50)
        for target in (generators.factorization(**options), generators.lora_linear(**options, scale=1.0, input_condition=1.0))
    ]
    assert np.array_equal(traces[0].error, traces[1].error)
    assert np.array_equal(traces[0].loss, traces[1].loss)


def test_definition_lora_linear_is_the_expected_loss() -> None:
    """½ E‖s (BA - M*) x‖² with Σ known only through the problem: quadratic in M, so compared through Hessian actions."""
    target = generators.lora_linear(m=6, n=5, rank=2, scale=2.0, input_condition=9.0)
    E = normal(20, 6, 5)
    G = target.gradient(target.truth + E)
    Sigma = torch.linalg.lstsq(E.T @ E, E.T @ G).solution / 2.0**2  # G = s² E Σ
    assert relative(2.0**2 * E @ Sigma, G) < 1e-9
    assert relative(Sigma, Sigma.T) < 1e-9
    values = torch.linalg.eigvalsh((Sigma + Sigma.T) / 2)
    assert float(values.max() / values.min()) == pytest.approx(9.0, rel=1e-8)
    assert float(target.loss(target.truth + E)) == pytest.approx(0.5 * float((G * E).sum()), rel=1e-10)
    assert float(target.loss(target.truth)) < 1e-25


def test_definition_spectra_and_independent_factors() -> None:
    """κ = s_1/s_r*, and V is not made from U's numbers (the pitfall)."""
    for spectrum in ("linear", "geometric", "power"):
        truth = make("factorization", m=12, n=12, rank=4, condition=50.0, spectrum=spectrum, symmetric=False).truth
        S = torch.linalg.svdvals(truth)
        assert float(S[0] / S[3]) == pytest.approx(50.0, rel=1e-9)
        assert float(S[4]) < 1e-12
        U, _, Vh = torch.linalg.svd(truth)
        assert float(torch.linalg.matrix_norm(U[:, :4].T @ Vh[:4].T, 2)) < 0.999


def test_definition_sensing_keeps_norms_on_average() -> None:
    """Σ_k <A_k, M>² ~ ‖M‖²: over 40 matrices the mean is 1 up to 4 sigmas of sqrt(2/p)/sqrt(40) each, p = 600."""
    target = make("sensing", m=20, measurements=600, symmetric=True)
    ratios = []
    for seed in range(40):
        X = normal(21 + seed, 20, 2)
        M = X @ X.T
        values: Tensor = target.measurement.forward(M)
        ratios.append(float((values**2).sum() / (M**2).sum()))
    assert abs(np.mean(ratios) - 1) < 0.08  # all 40 share one operator, whose own mean deviates by sqrt(2/600) = .058 at most
