"""Nyström start with ScaledGD against its spec (arXiv:2410.18965)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.operators import LowRank
from rankwise.problems import problem, scaled, solve
from rankwise.problems.trace import Trace
from tests.oracles.tools_training import normal, orthonormal, relative, with_spectrum

SPECTRUM = [100.0, 10.0, 1.0, 0.1]
M = with_spectrum(0, 30, 25, SPECTRUM)
Q = orthonormal(1, 30, 4)
P = (Q * torch.tensor(SPECTRUM, dtype=torch.float64)) @ Q.T
P = (P + P.T) / 2


def asymmetric(lr: float, iterations: int, rank: int = 4, *, target: Tensor = M, seed: int = 0) -> Trace:
    return scaled.nystrom_scaledgd(target, rank=rank, lr=lr, iterations=iterations, symmetric=False, seed=seed)


def symmetric(lr: float, iterations: int, *, target: Tensor = P, seed: int = 0) -> Trace:
    return scaled.nystrom_scaledgd(target, rank=4, lr=lr, iterations=iterations, symmetric=True, seed=seed)


@pytest.mark.parametrize("seed", range(5))
def test_1_one_step(seed: int) -> None:
    assert asymmetric(1.0, 1, seed=seed).error[1] < 2.8e-10  # 2.8e-11 in the spec, for its sketch


@pytest.mark.parametrize("seed", range(3))
def test_2_half_steps(seed: int) -> None:
    """The spec's .5, .125, 3.5e-3, 3e-6, 8.5e-12: with B₀ spanning range(M) the pair follows scalars, e.g. BA = c M."""
    b, a, expected = 1.0, 0.0, []
    for _ in range(5):  # per direction; at a = 0 the pseudo-inverse leaves b
        b, a = b - 0.5 * ((b * a - 1) / a if a else 0.0), a - 0.5 * (b * a - 1) / b
        expected.append(abs(b * a - 1))
    assert expected[:2] == [0.5, 0.125]
    assert expected[2] == pytest.approx(3.5e-3, rel=0.02)
    assert expected[3] == pytest.approx(3.0e-6, rel=0.05)
    assert expected[4] == pytest.approx(8.5e-12, rel=0.5) or expected[4] < 1e-11
    found = asymmetric(0.5, 5, seed=seed).error[1:]
    assert np.allclose(found[:4], expected[:4], rtol=1e-3)
    assert found[4] < 1e-10


def test_3_symmetric_is_quadratic() -> None:
    """e⁺ ~ e² near the end, on every sketch; then rounding halves. .3 falls by .40 per step."""
    counted = 0
    for seed in range(10):
        errors = symmetric(0.5, 60, seed=seed).error
        for before, after in pairwise(errors):
            if 1e-5 < before < 1e-2 and after > 1e-9:
                assert np.log10(after) / np.log10(before) > 1.4
                counted += 1
        assert errors.min() < 1e-14
    assert counted >= 5


@pytest.mark.parametrize("lr", [0.3, 0.4])
def test_3_other_rates_are_linear(lr: float) -> None:
    errors = symmetric(lr, 80).error
    tail = [after / before for before, after in pairwise(errors) if 1e-9 < before < 1e-4]
    assert len(tail) >= 3
    assert np.allclose(tail[-3:], abs(1 - 2 * lr), atol=0.01)


def test_4_small_random_start_has_ratio_one_half() -> None:
    X = 1e-3 * normal(2, 30, 4)
    trace = solve.solve(
        problem.factorizing(P, rank=4, symmetric=True),
        rank=4,
        init=LowRank(X, X.T.clone()),
        step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
        lr=0.5,
        iterations=55,
        symmetric=True,
    )
    tail = [after / before for before, after in pairwise(trace.error) if 1e-12 < before < 1e-6]
    assert len(tail) >= 5
    assert np.allclose(tail, 0.5, atol=5e-3)


def test_5_under_parameterized_reaches_eckart_young() -> None:
    expected = (1.0**2 + 0.1**2) ** 0.5
    assert expected == pytest.approx(1.0049875621, abs=1e-10)
    trace = asymmetric(1.0, 200, rank=2)
    assert trace.error[-1] * float(torch.linalg.norm(M)) == pytest.approx(expected, rel=1e-9)


def test_6_scalar_case_is_the_babylonian_root() -> None:
    s, phi = 2.0, 5.0
    start = torch.tensor([[phi]], dtype=torch.float64)
    for iterations in range(1, 7):
        phi = (phi + s / phi) / 2
        trace = solve.solve(
            problem.factorizing(torch.tensor([[s]], dtype=torch.float64), rank=1, symmetric=True),
            rank=1,
            init=LowRank(start, start.T.clone()),
            step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
            lr=0.5,
            iterations=iterations,
            symmetric=True,
        )
        assert float(trace.factors.B.detach()) == pytest.approx(phi, rel=1e-14)


@pytest.mark.parametrize("c", [0.01, 4.0, 300.0])
def test_7_scale_of_the_target_drops_out_of_the_asymmetric_trace(c: float) -> None:
    plain, scaled_up = asymmetric(0.5, 4).error, asymmetric(0.5, 4, target=c * M).error
    assert np.allclose(scaled_up, plain, rtol=1e-6, atol=1e-12)


def test_7_scale_of_the_target_is_seen_by_a_symmetric_sketch() -> None:
    """X₀ = c M Ω is not √c M Ω: only with Ω/√c is the relative trace the same. So the spec's line holds for the other form."""
    assert symmetric(0.5, 1, target=4.0 * P).error[0] > 2 * symmetric(0.5, 1).error[0]
    X, c = P @ normal(3, 30, 4), 4.0
    errors = [
        solve.solve(
            problem.factorizing(target, rank=4, symmetric=True),
            rank=4,
            init=LowRank(start, start.T.clone()),
            step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
            lr=0.5,
            iterations=6,
            symmetric=True,
        ).error
        for target, start in ((P, X), (c * P, c**0.5 * X))
    ]
    assert np.allclose(errors[1], errors[0], rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 3, 8, 15])
def test_7_iterates_stay_in_the_range(iterations: int) -> None:
    """Asymmetric from the sketch; symmetric from a well-conditioned X₀ in range(M).

    From the symmetric sketch, rounding in the first step leaves the range by ε ‖M‖ ‖X₀‖ / σ_min(X₀)²: over 15 sketches plain
    float64 iterations from the formula measure a median of 2.5e-10, above the spec's 1e-10, and halve from there.
    """
    B = asymmetric(0.5, iterations).factors.B.detach()
    U = torch.linalg.svd(M, full_matrices=False)[0][:, :4]
    assert relative(U @ (U.T @ B), B) < 1e-10
    start = Q @ orthonormal(4, 4, 4) * torch.tensor([9.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    X = (
        solve.solve(
            problem.factorizing(P, rank=4, symmetric=True),
            rank=4,
            init=LowRank(start, start.T.clone()),
            step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
            lr=0.5,
            iterations=iterations,
            symmetric=True,
        )
        .factors.B.detach()
        .clone()
    )
    assert relative(Q @ (Q.T @ X), X) < 1e-10
    if iterations >= 8:  # the sketch's rounding has been halved away
        sketched = symmetric(0.5, iterations).factors.B.detach()
        assert relative(Q @ (Q.T @ sketched), sketched) < 1e-10
