"""The asymmetric gap bound against its spec (arXiv:2506.14530): Rademacher averages and least squares by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankwise.certificates import asym_gap_bound, asym_gap_rate, calibrate, theory_asym_bound
from rankwise.certificates.asym_gap import union_over_beta


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def signs(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator(seed)).double() * 2 - 1


@pytest.mark.parametrize(("r", "N", "expected"), [(4, 200, 0.1339), (16, 200, 0.2781), (16, 800, 0.1375)])
def test_1_rademacher_average_is_just_below_the_rate(r: int, N: int, expected: float) -> None:
    n, repeats, values, bounds = 24, 400, [], []
    for seed in range(repeats):
        z = normal(seed, N, n) @ (normal(seed + 10**5, r, n) / n**0.5).T
        values.append(float((signs(seed + 10**6, N) @ z).norm() / N))
        bounds.append(asym_gap_bound(z.norm(dim=1), 1.0, delta=0.05).complexity / 2)
    found = torch.tensor(values, dtype=torch.float64)
    mean, error = float(found.mean()), float(found.std()) / repeats**0.5
    rate = asym_gap_rate(r, N).rank
    assert abs(rate - math.sqrt(r / N)) < 1e-15
    assert mean <= rate + 3 * error
    assert mean >= 0.9 * rate
    assert abs(mean - expected) < 4 * error + 0.002
    assert mean <= sum(bounds) / repeats + 3 * error  # the term of the bound really is above what it bounds
    assert abs(sum(bounds) / repeats / rate - 1) < 0.05


@pytest.mark.parametrize("c", [1e-3, 0.5, 7.0, 1e4])
def test_2_scale_moves_freely_between_the_factors(c: float) -> None:
    norms = normal(2, 30).abs()
    reference, moved = asym_gap_bound(norms, 3.0, 2.0, 1.5), asym_gap_bound(c * norms, 3.0 / c, 2.0, 1.5)
    assert abs(reference.value - moved.value) < 1e-12
    assert abs(reference.complexity - moved.complexity) < 1e-12


@pytest.mark.parametrize("r", [2, 4, 9])
def test_3_repeating_a_row_of_the_input_factor_costs_a_square_root(r: int) -> None:
    row, x = normal(3, 1, 7), normal(4, 7, 25)
    one = asym_gap_bound((row @ x).norm(dim=0), 1.7)
    many = asym_gap_bound((row.repeat(r, 1) @ x).norm(dim=0), 1.7)
    assert abs(many.complexity / one.complexity - math.sqrt(r)) < 1e-12
    assert many.fluctuation == one.fluctuation


def test_4_four_times_the_samples_halve_both_terms() -> None:
    norms = normal(5, 40).abs()
    one, four = asym_gap_bound(norms, 2.0, 1.3, 0.8, delta=0.1), asym_gap_bound(norms.repeat(4), 2.0, 1.3, 0.8, delta=0.1)
    assert abs(one.complexity / four.complexity - 2) < 1e-12
    assert abs(one.fluctuation / four.fluctuation - 2) < 1e-12
    assert asym_gap_rate(8, 400).rank * 2 == pytest.approx(asym_gap_rate(8, 100).rank, abs=1e-15)


def test_4_both_terms_as_defined() -> None:
    norms, beta, lip, M, delta = normal(6, 33).abs(), 2.5, 1.4, 0.9, 0.02
    found = asym_gap_bound(norms, beta, lip, M, delta=delta)
    first = 2 * beta * lip / 33 * math.sqrt(sum(float(value) ** 2 for value in norms))
    second = 3 * M * math.sqrt(math.log(2 / delta) / 66)
    assert abs(found.complexity - first) < 1e-12
    assert abs(found.fluctuation - second) < 1e-12
    assert abs(found.value - first - second) < 1e-12


@pytest.mark.parametrize("m", [2, 5, 16])
def test_4_several_outputs_cost_the_root_of_twice_their_number(m: int) -> None:
    """Contraction leaves E ‖Σ ε_i z_iᵀ‖_F with ε_i (m,), which grows like √m: a factor √2 L alone would not cover it."""
    z, lip, N = normal(7, 50, 4), 1.3, 50
    one, several = asym_gap_bound(z.norm(dim=1), 1.0, lip), asym_gap_bound(z.norm(dim=1), 1.0, lip, outputs=m)
    assert abs(several.complexity / one.complexity - math.sqrt(2 * m)) < 1e-12
    average = sum(float((signs(seed, m, N) @ z).norm()) for seed in range(300)) / 300 / N
    contracted = 2 * math.sqrt(2) * lip * average
    assert 0.9 * several.complexity < contracted <= several.complexity * 1.02
    assert contracted > math.sqrt(2) * one.complexity * 1.2


@pytest.mark.parametrize(("N", "repeats"), [(100, 1500), (1600, 300)])
def test_5_least_squares_is_faster_than_the_rate_and_its_fluctuation_is_the_floor(N: int, repeats: int) -> None:
    """Pure noise of variance 1 over a frozen A. Excess risk is r/v F(r, v) with v = N - r + 1, apart from the residual."""
    r, d, gaps = 8, 60, []
    A = normal(8, r, d) / d**0.5
    for seed in range(repeats):
        z, y = normal(seed, N, d) @ A.T, normal(seed + 10**6, N, 1)
        b = torch.linalg.solve(z.T @ z, z.T @ y)
        gaps.append(float(1 + (A.T @ b).pow(2).sum() - (y - z @ b).pow(2).mean()))
    found = torch.tensor(gaps, dtype=torch.float64)
    mean, spread = float(found.mean()), float(found.std())
    expected = r / N + r / (N - r - 1)
    assert abs(mean - expected) < 4 * spread / repeats**0.5
    v = N - r + 1
    variance = 2 * (N - r) / N**2 + 2 * r * (r + v - 2) / ((v - 2) ** 2 * (v - 4))
    assert abs(spread / math.sqrt(variance) - 1) < 4 / math.sqrt(2 * repeats)
    rate = asym_gap_rate(r, N)
    assert mean < 0.65 * rate.rank  # the rate is loose for this loss
    assert abs(spread / (math.sqrt(2) * rate.floor) - 1) < 0.15  # the floor is real


def test_5_the_exact_figures_of_the_reality_check() -> None:
    assert abs(8 / 100 + 8 / 91 - 0.1679) < 5e-5
    assert abs(asym_gap_rate(8, 100).rank - 0.28) < 5e-3
    for N, floor in ((100, 0.141), (1600, 0.0354)):
        assert abs(math.sqrt(2) * asym_gap_rate(8, N).floor - floor) < 5e-4


def test_6_calibration_recovers_noise_free_coefficients() -> None:
    def points(c: float, d: float) -> list[tuple[int, int, float]]:
        return [(r, N, c * math.sqrt(r / N) + d / math.sqrt(N)) for r in (2, 8, 32) for N in (100, 900)]

    for c, d in ((0.7, 0.2), (0.7, 0.0), (0.0, 0.2)):
        found = calibrate(points(c, d))
        assert abs(found.c - c) < 1e-8 and abs(found.d - d) < 1e-8 and found.residual < 1e-8
        assert abs(found.gap(16, 400) - (c * 0.2 + d / 20)) < 1e-8


def test_6_calibration_is_the_best_pair_that_is_not_negative() -> None:
    for seed in range(6):
        triples = [(r, N, float(normal(seed + r + N, 1))) for r in (1, 4, 16) for N in (50, 200)]

        def error(c: float, d: float) -> float:
            return sum((c * math.sqrt(r / N) + d / math.sqrt(N) - gap) ** 2 for r, N, gap in triples)  # noqa: B023

        found = calibrate(triples)
        assert found.c >= 0 and found.d >= 0
        grid = [i / 20 for i in range(80)]
        assert error(found.c, found.d) <= min(error(c, d) for c in grid for d in grid) + 1e-12


def test_7_the_shares_of_all_beta_sum_to_delta() -> None:
    """δ / (1 + 2j²) alone sums to 2.274 δ over all integers j, so each share is divided by that."""
    unshared = sum(1 / (1 + 2 * j * j) for j in range(-200_000, 200_001))
    limit = math.pi / math.sqrt(2) / math.tanh(math.pi / math.sqrt(2))
    assert abs(unshared - 2.274) < 5e-4 and abs(unshared - limit) < 1e-4
    delta, total = 0.05, 0.0
    for j in range(-300, 301):
        rounded, share = union_over_beta(2.0**j * 0.9, delta)
        assert rounded == 2.0**j
        assert abs(share - delta / (limit * (1 + 2 * j * j))) < 1e-15
        total += share
    tail = 2 * delta / (limit * 2 * 300.5)  # Σ_{|j| > 300} is about this
    assert abs(total + tail - delta) < 1e-6
    for beta in (1.0, 3.0, 0.3):
        rounded, _ = union_over_beta(beta, delta)
        assert beta <= rounded < 2 * beta and math.log2(rounded).is_integer()


@pytest.mark.parametrize("m", [1, 3])
def test_7_the_report_never_omits_the_union_over_beta(m: int) -> None:
    factor, norms = normal(9, m, 4) * 3, normal(10, 60).abs()
    beta = 2.0 ** math.ceil(math.log2(float(factor.norm())))
    share = 0.05 / (2.2743 * (1 + 2 * math.log2(beta) ** 2))
    expected = asym_gap_bound(norms, beta, 1.2, 0.7, outputs=m, delta=share)
    report = theory_asym_bound(rank=4, samples=60, norms=norms, factor=factor, lipschitz=1.2, loss_bound=0.7)
    assert report.bound is not None and abs(report.bound - expected.value) < 1e-5
    assert report.bound > asym_gap_bound(norms, float(factor.norm()), 1.2, 0.7, outputs=m).value
