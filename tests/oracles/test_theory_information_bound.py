"""Bits-counting bounds against their spec (arXiv:2402.16842): anchor figures, and the best of a finite class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rankwise.certificates import best_q, bits, compare, gap_it, gap_occam, samples_for, theory_information_bound

LAYERS = [(4096, 4096)] * 64  # q and v of 32 layers


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(shapes: list[tuple[int, int]], r: int) -> int:
    return sum(r * (m + n) for m, n in shapes)


def output_only(shapes: list[tuple[int, int]], r: int) -> int:
    return sum(r * m for m, _ in shapes)


@pytest.mark.parametrize(("width", "r", "N"), [(16, 2, 100), (4096, 8, 100_000)])
def test_1_freezing_one_factor_of_a_square_layer_saves_a_root_of_two(width: int, r: int, N: int) -> None:
    shapes = [(width, width)] * 3
    whole, half = gap_it(bits(both(shapes, r)), N), gap_it(bits(output_only(shapes, r)), N)
    assert abs(half / whole - 1 / math.sqrt(2)) < 1e-12
    assert gap_it(bits(output_only(shapes, 2 * r)), N) == whole
    rows = compare({"both": both(shapes, r), "output": output_only(shapes, r)}, N)
    (ratio,) = [value for key, value in rows[1].items() if "ratio" in key]
    assert abs(ratio - 1 / math.sqrt(2)) < 1e-12


def test_2_bits_add_up_over_layers_and_gaps_scale() -> None:
    shapes, r = [(12, 7), (5, 9), (16, 16)], 3
    tensors = {}
    for i, (m, n) in enumerate(shapes):
        tensors |= {f"{i}.B": normal(i, m, r), f"{i}.A": normal(i + 9, r, n)}
    single = [bits({key: value for key, value in tensors.items() if key.startswith(str(i))}, 8) for i in range(3)]
    assert bits(tensors, 8) == sum(single) == 8 * both(shapes, r) == bits(both(shapes, r), 8)
    K = bits(tensors)
    for factor in (4, 9, 100):
        assert abs(gap_it(factor * K, 500) / gap_it(K, 500) - math.sqrt(factor)) < 1e-12
        assert abs(gap_it(K, factor * 500) * math.sqrt(factor) / gap_it(K, 500) - 1) < 1e-12
        assert abs(gap_occam(K, factor * 500) * math.sqrt(factor) / gap_occam(K, 500) - 1) < 1e-12


def test_2_a_file_counts_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "adapter.bin"
    path.write_bytes(b"x" * 123)
    assert bits(path) == 8 * 123


@pytest.mark.parametrize(
    ("P", "expected", "tolerance"),
    [
        (both(LAYERS, 8), 15.25, 5e-3),
        (output_only(LAYERS, 8), 10.78, 5e-3),
        (7 * 32 * 16 * 16, 1.783, 5e-4),
        (200, 0.1053, 5e-5),
    ],
)
def test_3_anchors_in_expectation(P: int, expected: float, tolerance: float) -> None:
    assert abs(gap_it(bits(P), 100_000) - expected) < tolerance
    by_hand = math.sqrt(2 * 0.25 * P * 16 * math.log(2) / 100_000)
    assert abs(gap_it(bits(P), 100_000) - by_hand) < 1e-12 * by_hand


def test_3_parameter_counts_and_the_bound_of_one_trained_model() -> None:
    assert both(LAYERS, 8) == 4_194_304 and 7 * 32 * 16 * 16 == 57_344
    assert abs(gap_occam(bits(200), 100_000, delta=0.05) - 0.1054) < 5e-5
    assert theory_information_bound(both(LAYERS, 8), 100_000).vacuous is True
    report = theory_information_bound(200, 100_000)
    assert report.vacuous is False
    assert report.bound is not None and abs(report.bound - 0.1054) < 5e-5
    assert theory_information_bound(200, 100_000, extra_bits=64).bound == gap_occam(3264, 100_000)


def test_3_samples_and_bits_for_a_gap_of_a_tenth() -> None:
    most = 0.1**2 * 100_000 / (0.5 * math.log(2))
    assert abs(most - 2.9e3) < 50
    assert abs(gap_it(most, 100_000) - 0.1) < 1e-12
    assert abs(samples_for(0.1, most) - 100_000) < 1e-6
    assert abs(gap_it(5000, int(samples_for(0.05, 5000, sigma=0.7)), sigma=0.7) - 0.05) < 1e-5


@pytest.mark.parametrize(("N", "delta"), [(10, 0.05), (1000, 0.2), (200, 1e-6)])
def test_4_no_bits_leave_hoeffding(N: int, delta: float) -> None:
    assert abs(gap_occam(0, N, delta=delta) - math.sqrt(math.log(1 / delta) / (2 * N))) < 1e-15


def test_5_the_best_of_all_classifiers_stays_within_the_bound() -> None:
    K, N, repeats, delta = 6, 200, 500, 0.05
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(repeats):
        labels = torch.randint(0, 2, (N,), generator=generator)
        answers = torch.randint(0, 2, (2**K, N), generator=generator)
        gaps.append(0.5 - float((answers != labels).double().mean(dim=1).min()))
    bound = gap_occam(K, N, delta=delta)
    assert sum(gap > bound for gap in gaps) / repeats <= delta
    ignoring = gap_occam(0, N, delta=delta)
    assert sum(gap > ignoring for gap in gaps) / repeats > delta  # the choice costs bits
    assert sum(gaps) / repeats <= gap_it(K, N)


def test_6_one_half_is_the_constant_of_the_unit_interval() -> None:
    """log E exp(t (X - p)) <= σ² t² / 2 for all p and t holds at σ = 1/2 and at nothing smaller."""
    largest = 0.0
    for i in range(1, 100):
        p = i / 100
        for t in [sign * 10.0**e for e in (-2, -1, 0, 1) for sign in (-1.0, 1.0)] + [0.3, 3.0, 5.0]:
            moment = math.log(p * math.exp(t * (1 - p)) + (1 - p) * math.exp(-t * p))
            assert moment <= t * t / 8 + 1e-12
            largest = max(largest, 2 * moment / t**2)
    assert abs(math.sqrt(largest) - 0.5) < 1e-4
    assert gap_it(1234, 77) == gap_it(1234, 77, sigma=0.5)


def test_7_choosing_a_width_pays_for_the_choice() -> None:
    tensors = {"B": normal(1, 4, 2), "A": normal(2, 2, 5)}

    def risk(quantized: Mapping[str, Tensor]) -> float:
        return min(1.0, float(sum((quantized[key] - tensors[key]).abs().mean() for key in tensors)))

    N, levels = 4000, (16, 8, 4, 3, 2)
    chosen = best_q(tensors, risk, N, levels=levels, delta=0.05)
    totals = {}
    for q in levels:
        single = best_q(tensors, risk, N, levels=(q,), delta=0.05)
        assert len({float(value) for value in single.tensors["B"].flatten()}) <= 2**q - 1
        stored = q * 18 + 32 * 2  # the step of each of the two tensors is stored too
        totals[q] = risk(dict(single.tensors)) + gap_occam(stored + math.log2(len(levels)), N, delta=0.05)
    assert chosen.q == min(totals, key=lambda q: totals[q])
    assert any(abs(value - totals[chosen.q]) < 1e-9 for row in chosen.table for value in row.values())
