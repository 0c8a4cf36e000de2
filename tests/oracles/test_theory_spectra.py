"""Oracles of the rank measures; numbered in the order in which the specification lists them."""

import itertools

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise import certificates
from rankwise.core.operators import LowRank
from tests.oracles.tools import DOUBLE, close, randn

ORDER = ("stable", "participation", "energy_entropy", "effective", "hard")


def spectra(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        yield torch.rand(1 + k % 9, generator=generator, dtype=DOUBLE) ** (1 + k % 4) + 1e-6


def test_1_a_spectrum_by_hand():
    found = certificates.ranks(torch.tensor([3.0, 2.0, 1.0], dtype=DOUBLE))
    expected = {"stable": 1.5555556, "effective": 2.7494593, "participation": 2.0, "nuclear": 2.5714286, "energy_rank": 2}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("k", [1, 4])
def test_2_equal_values_and_bounds(k):
    # energy_rank needs 90 % of the energy, which k equal values give only all together where k < 10
    assert list(certificates.ranks(torch.full((k,), 2.5, dtype=DOUBLE)).values()) == pytest.approx([k] * 7)
    for s in spectra(200):
        found = certificates.ranks(s)
        assert all(value <= found["hard"] + 1e-9 for value in found.values())


def test_2_no_dependence_on_scale_or_rotation():
    D = randn(7, 3, seed=1) @ randn(3, 5, seed=2)
    Q, R = torch.linalg.qr(randn(7, 7, seed=3))[0], torch.linalg.qr(randn(5, 5, seed=4))[0]
    before = certificates.ranks(certificates.spectrum(D), tolerance=1e-10)
    after = certificates.ranks(certificates.spectrum(3.7 * Q @ D @ R), tolerance=1e-10)
    assert after == pytest.approx(before, rel=1e-9) and before["hard"] == 3


def test_3_renyi_order():
    for s in spectra(2000, seed=1):
        found = certificates.ranks(s)
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise([1.0, *(found[key] for key in ORDER)]))


def test_4_core_equals_dense():
    pair = LowRank(randn(9, 3, seed=1), randn(3, 7, seed=2), 0.7)
    close(certificates.spectrum(pair)[:3], torch.linalg.svdvals(0.7 * pair.B @ pair.A)[:3], 1e-10)


def test_5_noise_already_has_high_rank():
    # The share at the specification's m = n = 400 is 0.5125; 0.51 +- 0.02 at a quarter of the size.
    found = certificates.ranks(torch.linalg.svdvals(randn(100, 100, seed=1)))
    assert found["energy_rank"] / 100 == pytest.approx(0.51, abs=0.02)


def test_6_local_rank():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 7)).double()
    assert certificates.local_rank(net, randn(4, 6, seed=1), "4") == 3
    same = nn.Sequential(nn.Identity())
    assert certificates.local_rank(same, randn(4, 6, seed=1), "0") == 6


def test_7_overlap():
    Q = torch.linalg.qr(randn(8, 8, seed=1))[0]
    assert certificates.overlap(Q[:, :3], Q[:, :3]) == pytest.approx(1)
    assert certificates.overlap(Q[:, :3], Q[:, 3:]) == pytest.approx(0, abs=1e-12)
    drawn = [certificates.overlap(randn(8, 2, seed=k), randn(8, 3, seed=k + 999)) for k in range(300)]
    assert sum(drawn) / 300 == pytest.approx(3 / 8, abs=0.03)  # one deviation of a draw is about 0.15: three of the mean


def test_8_a_dominating_layer_gets_the_whole_budget():
    table = {"big": torch.tensor([9.0, 8, 7, 6]), "small": torch.tensor([1.0, 0.5])}
    assert certificates.suggest_ranks(table, 4).get("small", 0) == 0 and certificates.suggest_ranks(table, 4)["big"] == 4
    shapes = {"big": (6, 4), "small": (6, 4)}
    assert certificates.suggest_ranks(table, 30, shapes=shapes)["big"] == 3


def test_8_the_report_has_the_measures_of_every_site():
    report = rw.catalog.theory_spectra({"a": LowRank(randn(9, 2), randn(2, 7, seed=1))})
    assert report.bound is None and len(report.table) == 1
