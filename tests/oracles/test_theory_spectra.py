"""Rank measures against their spec (arXiv:2405.09673, arXiv:2410.07687): hand numbers, orderings and exact Jacobians."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from rankwise.certificates import delta_rank, local_rank, overlap, ranks, spectrum, suggest_ranks, theory_spectra
from rankwise.core.operators import LowRank

MEASURES = ["stable", "participation", "energy_entropy", "effective", "hard"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(s: Tensor) -> dict[str, float]:
    s = s[s > 0]
    p, e = s / s.sum(), s**2 / (s**2).sum()
    kept = e.sort(descending=True).values.cumsum(0)
    return {
        "hard": float(len(s)),
        "stable": float((s**2).sum() / s.max() ** 2),
        "effective": float(torch.exp(-(p * p.log()).sum())),
        "energy_entropy": float(torch.exp(-(e * e.log()).sum())),
        "participation": float((s**2).sum() ** 2 / (s**4).sum()),
        "nuclear": float(s.sum() ** 2 / (s**2).sum()),
        "energy_rank": float(1 + int((kept < 0.9 - 1e-12).sum())),
    }


def test_1_three_two_one() -> None:
    found = ranks(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert abs(found["stable"] - 1.5555556) < 5e-8
    assert abs(found["effective"] - 2.7494593) < 5e-8
    assert abs(found["participation"] - 2.0) < 5e-8
    assert abs(found["nuclear"] - 2.5714286) < 5e-8
    assert found["energy_rank"] == 2 and found["hard"] == 3


def test_1_every_measure_as_defined() -> None:
    for seed in range(50):
        s = normal(seed, 1 + seed % 12).abs()
        found, expected = ranks(s), by_hand(s)
        assert set(expected) <= set(found)
        for name, value in expected.items():
            assert abs(found[name] - value) < 1e-10, name


def test_2_hard_rank_bounds_all_and_they_agree_at_the_extremes() -> None:
    for k in (1, 2, 7):
        flat = ranks(torch.full((k,), 3.7, dtype=torch.float64))
        for name in ["nuclear", *MEASURES]:
            assert abs(flat[name] - k) < 1e-10
        assert flat["energy_rank"] == -(-9 * k // 10)  # k equal values: the least number with nine tenths of them
    single = ranks(spectrum(torch.outer(normal(0, 9), normal(1, 6))))
    for name in ["nuclear", "energy_rank", *MEASURES]:
        assert abs(single[name] - 1) < 1e-6, name
    for seed in range(20):
        found = ranks(spectrum(normal(seed, 9, 6)))
        assert all(found[name] <= found["hard"] + 1e-12 for name in ["nuclear", "energy_rank", *MEASURES])


def test_2_scaling_and_rotation_change_nothing() -> None:
    matrix = normal(2, 9, 4) @ normal(3, 4, 7)
    P, Q = torch.linalg.qr(normal(4, 9, 9))[0], torch.linalg.qr(normal(5, 7, 7))[0]
    reference = ranks(spectrum(matrix))
    assert reference["hard"] == 4
    for other in (1e-6 * matrix, -250.0 * matrix, P @ matrix @ Q, matrix.T):
        found = ranks(spectrum(other))
        for name in ["nuclear", "energy_rank", *MEASURES]:
            assert abs(found[name] - reference[name]) < 1e-9, name


def test_3_renyi_ordering_over_two_thousand_spectra() -> None:
    violations = 0
    for seed in range(2000):
        s = normal(seed, 2 + seed % 20).abs() ** (1 + seed % 4) + 1e-6
        found = ranks(s, tolerance=1e-15)
        chain = [1.0, *(found[name] for name in MEASURES)]
        violations += sum(later < earlier - 1e-9 for earlier, later in itertools.pairwise(chain))
    assert violations == 0


@pytest.mark.parametrize(("m", "n", "r"), [(12, 9, 3), (5, 16, 4), (4, 3, 6)])
def test_4_small_core_gives_the_dense_spectrum(m: int, n: int, r: int) -> None:
    operator = LowRank(normal(6, m, r), normal(7, r, n), scale=-0.3)
    dense = torch.linalg.svdvals(-0.3 * operator.B @ operator.A)
    found = spectrum(operator)
    k = min(m, n, r)
    assert float((found[:k] - dense[:k]).abs().max()) < 1e-10
    assert float(found[k:].abs().sum()) < 1e-10


def test_4_the_scale_is_in_the_update_and_delta_rank_is_that_of_the_difference() -> None:
    operator = LowRank(normal(6, 8, 2), normal(7, 2, 8), scale=4.0)
    assert torch.allclose(spectrum(operator), 4.0 * spectrum(LowRank(operator.B, operator.A)), rtol=1e-12)
    base = normal(8, 8, 8)
    found = delta_rank({"w": base}, {"w": base + operator.dense()})["w"]
    expected = by_hand(torch.linalg.svdvals(operator.dense())[:2])
    for name in ("stable", "effective", "participation", "energy_entropy", "nuclear"):
        assert abs(found[name] - expected[name]) < 1e-6
    report = theory_spectra({"w": operator})
    row = next(row for row in report.table if "w" in row.values())
    assert abs(row["stable"] - expected["stable"]) < 1e-10


def test_5_pure_noise_needs_half_of_all_directions() -> None:
    n = 400
    share = ranks(spectrum(normal(9, n, n)))["energy_rank"] / n
    assert abs(share - 0.5125) < 0.0075


def test_6_local_rank_is_the_width_of_the_bottleneck() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3), nn.Tanh(), nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 6)
        )
    model = model.double().eval()
    x = normal(10, 5, 8)
    layers = {"0": 8, "2": 3, "4": 3, "6": 3}
    for layer, width in layers.items():
        jacobians = [torch.autograd.functional.jacobian(model[: int(layer) + 1], x[i]) for i in range(len(x))]
        exact = sum(int((torch.linalg.svdvals(J) > 1e-6).sum()) for J in jacobians) / len(jacobians)
        assert local_rank(model, x, layer) == exact == width
    assert local_rank(model, x, "6", probes=6) == 3  # a sketch of twice the rank


def test_6_the_identity_has_all_its_inputs() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity()).eval()
    assert local_rank(model, normal(11, 4, 7), "1") == 7


def test_7_overlap_of_equal_and_of_orthogonal_spans() -> None:
    basis = torch.linalg.qr(normal(12, 10, 10))[0]
    U, rest = basis[:, :4], basis[:, 4:]
    assert abs(overlap(U, U) - 1) < 1e-12
    assert abs(overlap(U, U[:, [2, 0]]) - 1) < 1e-12  # contained
    assert overlap(U, rest) < 1e-12
    assert abs(overlap(U, U @ torch.linalg.qr(normal(13, 4, 4))[0]) - 1) < 1e-12  # of spans, not of bases


@pytest.mark.parametrize(("d", "i", "j"), [(16, 3, 5), (16, 8, 2)])
def test_7_random_spans_overlap_by_the_larger_share(d: int, i: int, j: int) -> None:
    found = torch.tensor(
        [overlap(torch.linalg.qr(normal(s, d, i))[0], torch.linalg.qr(normal(s + 10**6, d, j))[0]) for s in range(600)],
        dtype=torch.float64,
    )
    assert abs(float(found.mean()) - max(i, j) / d) < 4 * float(found.std()) / len(found) ** 0.5


def test_8_a_dominating_layer_takes_the_whole_budget() -> None:
    table = {
        "small": torch.full((8,), 0.01, dtype=torch.float64),
        "large": torch.linspace(10, 5, 8, dtype=torch.float64),
        "other": torch.full((8,), 0.02, dtype=torch.float64),
    }
    assert suggest_ranks(table, 6) == {"small": 0, "large": 6, "other": 0}
    shapes = dict.fromkeys(table, (8, 8))
    assert suggest_ranks(table, 5 * 16, shapes=shapes) == {"small": 0, "large": 5, "other": 0}


def test_8_equal_shapes_get_the_best_allocation_of_all() -> None:
    for seed in range(10):
        table = {name: normal(20 * seed + i, 4).abs().sort(descending=True).values for i, name in enumerate("abc")}

        def kept(choice: tuple[int, ...]) -> float:
            return float(sum((s[:r] ** 2).sum() for s, r in zip(table.values(), choice, strict=True)))  # noqa: B023

        for budget in range(13):
            best = max(kept(choice) for choice in itertools.product(range(5), repeat=3) if sum(choice) <= budget)
            found = suggest_ranks(table, budget)
            assert sum(found.values()) <= budget
            assert abs(kept(tuple(found[name] for name in table)) - best) < 1e-12
