"""Nyström start and NoRA against their spec (arXiv:2410.18965)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import rankwise
from rankwise.core.operators import LowRank
from rankwise.problems import generators, problem, scaled, solve
from tests.oracles.tools_training import (
    SITE,
    adapted,
    directions,
    drawn,
    normal,
    orthonormal,
    relative,
    started,
    statistics_of,
    with_spectrum,
)


def psd(n: int, spectrum: list[float]) -> torch.Tensor:
    Q = orthonormal(0, n, len(spectrum))
    matrix = (Q * torch.tensor(spectrum, dtype=torch.float64)) @ Q.T
    return (matrix + matrix.T) / 2  # symmetric to the bit


HARD = psd(60, torch.linspace(1.0, 0.01, 5, dtype=torch.float64).tolist())


def test_1_symmetric_is_quadratic() -> None:
    """On the median sketch. A sketch with a tiny σ_min(Ω) (1 of 6) spends more steps on halving a large first error."""
    traces = [scaled.nystrom_scaledgd(HARD, rank=5, symmetric=True, lr=0.5, iterations=10, seed=seed) for seed in range(15)]
    assert np.median([trace.error.min() for trace in traces]) < 1e-12
    counted = 0
    for trace in traces:  # digits nearly double per step once the error is small, until rounding
        for before, after in pairwise(trace.error):
            if before < 1e-3 and after > 1e-11:
                assert np.log10(after) / np.log10(before) > 1.6
                counted += 1
    assert counted > 10


def test_1_small_random_start_is_linear_with_ratio_one_half() -> None:
    X = 1e-3 * normal(2, 60, 5)
    trace = solve.solve(
        problem.factorizing(HARD, rank=5, symmetric=True),
        rank=5,
        init=LowRank(X, X.T.clone()),
        step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
        lr=0.5,
        iterations=40,
        symmetric=True,
    )
    ratios = trace.error[26:36] / trace.error[25:35]
    assert trace.error[25] < 1e-3
    assert abs(ratios - 0.5).max() < 0.01
    assert trace.error[36] > 1e-14  # all of it above rounding


def test_2_asymmetric_needs_one_step() -> None:
    truth = with_spectrum(3, 50, 40, [4.0, 2.0, 1.0, 0.1])
    errors = scaled.nystrom_scaledgd(truth, rank=4, lr=1.0, iterations=1, symmetric=False, seed=1).error
    assert errors[1] < 1e-10
    drawn_problem = generators.factorization(m=50, n=40, rank=4, spectrum=[4.0, 2.0, 1.0, 0.1])
    assert scaled.nystrom_scaledgd(drawn_problem, iterations=1).error[1] < 1e-10


def test_3_iterates_stay_in_the_range() -> None:
    """From a well-conditioned X₀ in range(M).

    From the sketch M Ω itself, rounding alone leaves the range by about ε ‖M‖ ‖X₀‖ / σ_min(X₀)² in the first step: plain
    float64 iterations written from the formula measure 1.3e-12, 8e-12, 3.3e-10 for three sketches of this M, above the spec's
    1e-12, and halve from there.
    """
    Q = orthonormal(0, 60, 5)
    X = Q @ orthonormal(20, 5, 5) * torch.tensor([2.0, 1.0, 0.5, 0.4, 0.3], dtype=torch.float64)
    for _ in range(12):
        trace = solve.solve(
            problem.factorizing(HARD, rank=5, symmetric=True),
            rank=5,
            init=LowRank(X, X.T.clone()),
            step=rankwise.compose("lora + sgd + scaled_gd(damping=0.0)").steps(),
            lr=0.5,
            iterations=1,
            symmetric=True,
        )
        expected = (X + HARD @ X @ torch.linalg.inv(X.T @ X)) / 2
        X = trace.factors.B.detach().clone()
        assert relative(X, expected) < 1e-10
        assert float(torch.linalg.norm(X - Q @ (Q.T @ X))) < 1e-12
    assert trace.error[-1] < 1e-12


def test_4_output_is_the_base_and_rows_lie_in_the_row_space() -> None:
    weight = with_spectrum(4, 9, 12, [3.0, 1.0, 0.2])
    model, handle = adapted(weight, rankwise.catalog.nystrom_nora(rank=4, sigma=0.5))
    x = normal(5, 6, 12)
    assert torch.equal(model(x), torch.nn.functional.linear(x, weight))
    V = torch.linalg.svd(weight, full_matrices=False)[2][:3].T
    A = handle.parameterization(SITE).roles()["A"].detach()
    assert float(torch.linalg.norm(A - A @ V @ V.T)) < 1e-6
    assert int(torch.linalg.matrix_rank(A, rtol=1e-8)) == 3
    _, plain = adapted(weight, rankwise.catalog.lora(rank=4))
    kaiming = plain.parameterization(SITE).roles()["A"].detach()
    assert float(torch.linalg.norm(kaiming - kaiming @ V @ V.T)) > 1e-1


@pytest.mark.parametrize(("sigma", "scale"), [(0.02, 1.0), (0.5, 2.0)])
def test_5_second_moment_of_the_sketch(sigma: float, scale: float) -> None:
    rank, weight = 6, with_spectrum(6, 6, 8, [2.0, 1.5, 1.2, 1.0, 0.7, 0.5])
    start = rankwise.catalog.nystrom_nora(rank=rank, sigma=sigma).start
    assert start is not None
    sketch, generator, known = start.build(), drawn(7), statistics_of(weight)
    total = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(2000):
        A = sketch(known, rank, generator=generator, scale=scale).A
        total += A.T @ A
    assert relative(total / 2000, (sigma / scale) ** 2 * rank * weight.T @ weight) < 0.05


def test_5_each_sketch_is_another_one() -> None:
    weight, recipe = normal(8, 6, 8), rankwise.catalog.nystrom_nora(rank=3)
    first, again, other = (started(recipe, statistics_of(weight), 3, seed=seed).A for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert relative(other, first) > 0.1


@pytest.mark.parametrize("c", [0.1, 3.0, 30.0])
def test_6_normalized_preconditioner_drops_the_size_of_the_factors(c: float) -> None:
    B, A, g_B, g_A = normal(9, 8, 3), normal(10, 3, 7), normal(11, 8, 3), normal(12, 3, 7)
    assert float(torch.linalg.svdvals(0.1 * B)[-1] ** 2) > 1e3 * 1e-6  # the spec's condition on σ_min(B)²
    name = "scaled_gd"
    recipe = "lora + sgd + scaled_gd(normalized=True, damping=1e-6)"
    plain = directions(recipe, {"B": B, "A": A}, {"B": g_B, "A": g_A}, name)
    rescaled = directions(recipe, {"B": c * B, "A": A / c}, {"B": g_B, "A": g_A}, name)
    for role in ("B", "A"):
        assert relative(rescaled[role], plain[role]) < 1e-3
    inverse = torch.linalg.inv(B.T @ B + 1e-6 * torch.eye(3, dtype=torch.float64))
    assert relative(plain["A"], inverse @ g_A / torch.linalg.norm(inverse)) < 1e-10


def test_6_first_step_skips_the_zero_factor() -> None:
    """NoRA+ at B = 0: g_A is not preconditioned, and nothing grows by 1/damping."""
    g_B, g_A = normal(13, 8, 3), normal(14, 3, 7)
    block = {"B": torch.zeros(8, 3, dtype=torch.float64), "A": normal(15, 3, 7)}
    found = directions("lora + sgd + scaled_gd(normalized=True)", block, {"B": g_B, "A": g_A}, "scaled_gd")
    assert torch.equal(found["A"], g_A)
    inverse = torch.linalg.inv(block["A"] @ block["A"].T + 1e-6 * torch.eye(3, dtype=torch.float64))
    assert relative(found["B"], g_B @ inverse / torch.linalg.norm(inverse)) < 1e-9 or torch.equal(found["B"], g_B)
