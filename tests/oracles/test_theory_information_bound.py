"""Oracles of the bits-counting bounds; numbered in the order in which the specification lists them."""

import math

import pytest
import torch

import rankwise as rw
from rankwise.certificates import bits, compare, gap_it, gap_occam, samples_for


def test_1_training_b_alone_gains_a_root_of_two():
    r, d, N = 8, 64, 1000
    both, only_b, twice = (gap_it(bits(P), N) for P in (2 * r * d, r * d, 2 * r * d))
    assert only_b / both == pytest.approx(1 / math.sqrt(2), rel=1e-12) and twice == both


def test_2_additivity_and_rates():
    tensors = {"x": torch.zeros(3, 4), "y": torch.zeros(5)}
    assert bits(tensors, 8) == bits({"x": tensors["x"]}, 8) + bits({"y": tensors["y"]}, 8) == 17 * 8
    assert gap_it(4 * 800.0, 100) == pytest.approx(2 * gap_it(800.0, 100), rel=1e-12)
    assert gap_it(800.0, 400) == pytest.approx(gap_it(800.0, 100) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("P", "gap", "digits"), [(4_194_304, 15.25, 0.005), (2_097_152, 10.78, 0.005), (57_344, 1.783, 5e-4), (200, 0.1053, 5e-5)]
)
def test_3_anchors(P, gap, digits):
    assert gap_it(bits(P, 16), 100_000) == pytest.approx(gap, abs=digits)
    report = rw.catalog.theory_information_bound(P, 100_000)
    assert report.vacuous is (gap > 1)


def test_3_anchor_of_occam_and_the_bits_of_a_gap():
    assert gap_occam(3200, 100_000) == pytest.approx(math.sqrt((3200 * math.log(2) + math.log(20)) / 200_000), rel=1e-12)
    assert gap_occam(3200, 100_000) == pytest.approx(0.1054, abs=1e-4)
    assert samples_for(0.1, 2.9e3) == pytest.approx(1e5, rel=0.01)
    rows = compare({"both": 200, "half": 100}, 1000)
    assert len(rows) == 2


def test_4_no_bits_is_hoeffding():
    assert gap_occam(0, 250, delta=0.1) == pytest.approx(math.sqrt(math.log(10) / 500), rel=1e-12)


def test_5_the_best_of_a_finite_class_breaks_the_bound_no_more_often_than_delta():
    K, N, delta = 7, 200, 0.05
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(500, 2**K, N, generator=generator).lt_(0.5).mean(2)  # every classifier's true risk is 1/2
    gaps = 0.5 - errors.min(1).values
    assert float((gaps > gap_occam(K, N, delta=delta)).float().mean()) <= delta
    assert float(gaps.mean()) > 0.5 * gap_occam(K, N, delta=delta)  # and the bound is not idle


def test_6_one_half_is_the_sub_gaussian_constant_of_the_unit_interval():
    p, t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)[:, None], torch.linspace(-20, 20, 401, dtype=torch.float64)
    moment = (p * torch.exp(t * (1 - p)) + (1 - p) * torch.exp(-t * p)).log()
    assert (moment <= t.square() * 0.25 / 2 + 1e-12).all()
    assert gap_it(100.0, 50) == gap_it(100.0, 50, sigma=0.5) == pytest.approx(math.sqrt(100 * math.log(2) / 100), rel=1e-12)
