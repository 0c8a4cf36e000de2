"""Oracles of the asymmetric gap bound; numbered in the order in which the specification lists them."""

import math

import pytest
import torch

from rankwise.certificates import asym_gap_bound, asym_gap_rate, calibrate
from tests.oracles.tools import DOUBLE, randn


@pytest.mark.parametrize(("r", "N", "measured"), [(4, 200, 0.1339), (16, 200, 0.2781), (16, 800, 0.1375)])
def test_1_rademacher(r, N, measured):
    n, values = 30, []
    for k in range(200):
        A, X = randn(r, n, seed=k) / math.sqrt(n), randn(N, n, seed=k + 5000)
        signs = randn(N, seed=k + 9000).sign()
        values.append(float((signs @ X @ A.t()).norm()) / N)
    mean, error = sum(values) / 200, float(torch.tensor(values).std()) / math.sqrt(200)
    rate = asym_gap_rate(r, N).rank
    assert rate == pytest.approx(math.sqrt(r / N), rel=1e-12)
    assert mean <= rate + 3 * error and mean >= 0.9 * rate - 3 * error
    assert mean == pytest.approx(measured, abs=4 * error)


def test_2_homogeneity():
    norms = randn(50, 4, seed=1).norm(dim=1)
    one, other = asym_gap_bound(norms, 1.3), asym_gap_bound(3.7 * norms, 1.3 / 3.7)
    assert other.value == pytest.approx(one.value, rel=1e-12)


def test_2_the_formula():
    norms, N = randn(50, 4, seed=1).norm(dim=1), 50
    found = asym_gap_bound(norms, 1.3, 1.0, 2.0, delta=0.1)
    assert found.complexity == pytest.approx(2 * 1.3 / N * float(norms.square().sum().sqrt()), rel=1e-12)
    assert found.fluctuation == pytest.approx(3 * 2.0 * math.sqrt(math.log(2 / 0.1) / (2 * N)), rel=1e-12)


def test_2_several_outputs_cost_the_root_of_their_number():
    # The specification multiplies the first term by √2·L alone. Vector contraction draws one sign per sample and output, and
    # sup_B Σ ε_ik (B h_i)_k = β‖Σ ε_i h_iᵀ‖_F, whose mean is √m times that of one output (below, m = 3: 1.73 within 10 %).
    # The first term is therefore 2√2·L·β/N·√(m Σ‖h_i‖²); without √m it would be below what it has to bound.
    H, m = randn(50, 4, seed=1), 3
    one, three = (
        sum(float((randn(50, outputs, seed=k).sign().t() @ H).norm()) for k in range(400)) / 400 for outputs in (1, m)
    )
    assert three / one == pytest.approx(math.sqrt(m), rel=0.1)
    norms = H.norm(dim=1)
    single, several = asym_gap_bound(norms, 1.3), asym_gap_bound(norms, 1.3, 1.5, outputs=m)
    assert several.complexity == pytest.approx(math.sqrt(2 * m) * 1.5 * single.complexity, rel=1e-12)
    assert several.fluctuation == single.fluctuation
    assert 2 * math.sqrt(2) * 1.5 * 1.3 / 50 * three <= several.complexity


@pytest.mark.parametrize("r", [2, 5])
def test_3_replicated_rows(r):
    a, X = randn(1, 6, seed=1), randn(40, 6, seed=2)
    one, many = ((X @ A.t()).norm(dim=1) for A in (a, a.repeat(r, 1)))
    ratio = asym_gap_bound(many, 1.0).complexity / asym_gap_bound(one, 1.0).complexity
    assert ratio == pytest.approx(math.sqrt(r), rel=1e-12)


def test_4_four_times_the_samples_halve_both_terms():
    norms = randn(50, 4, seed=1).norm(dim=1)
    few, many = asym_gap_bound(norms, 1.0), asym_gap_bound(norms.repeat(4), 1.0)
    assert many.complexity == pytest.approx(few.complexity / 2, rel=1e-12)
    assert many.fluctuation == pytest.approx(few.fluctuation / 2, rel=1e-12)


def test_5_least_squares_on_noise_is_better_than_the_rate():
    r, N, d, gaps = 8, 100, 60, []
    for k in range(600):
        A = torch.linalg.qr(randn(d, r, seed=k))[0].t()
        Z, y = randn(N, d, seed=k + 2000) @ A.t(), randn(N, seed=k + 4000)
        b = torch.linalg.solve(Z.t() @ Z, Z.t() @ y)
        gaps.append(1 + float(b.square().sum()) - float((Z @ b - y).square().mean()))  # A Aᵀ = I: test risk 1 + |b|²
    values = torch.tensor(gaps, dtype=DOUBLE)
    exact, error = r / N + r / (N - r - 1), float(values.std()) / math.sqrt(600)
    assert exact == pytest.approx(0.1679, abs=5e-5)
    assert float(values.mean()) == pytest.approx(exact, abs=4 * error)
    assert float(values.mean()) < 0.7 * asym_gap_rate(r, N).rank
    assert 0.5 * math.sqrt(2 / N) < float(values.std()) < 1.5 * math.sqrt(2 / N)


def test_6_calibration():
    points = [(r, N, 0.7 * math.sqrt(r / N) + 0.2 / math.sqrt(N)) for r in (2, 8, 32) for N in (50, 200)]
    found = calibrate(points)
    assert (found.c, found.d) == pytest.approx((0.7, 0.2), abs=1e-8) and found.residual < 1e-8
