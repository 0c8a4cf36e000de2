"""EVA against its spec (arXiv:2410.07170)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.approximations.budget import ExplainedVariance, redistribute
from rankwise.core.statistics import Statistic
from tests.oracles.tools_training import (
    SITE,
    adapted,
    layer_model,
    normal,
    orthonormal,
    sine_of_angle,
    started,
    statistics_of,
)

N = 32
BATCHES = [  # 5 batches of 512 tokens with spectrum 2^-i, away from the origin
    normal(batch, 512, N) * 2.0 ** -torch.arange(N, dtype=torch.float64) @ orthonormal(99, N, N).T + 0.3 for batch in range(5)
]
CENTERED = torch.cat(BATCHES) - torch.cat(BATCHES).mean(0)


def directions(batches: list[Tensor], rank: int, *, center: bool = True) -> Tensor:
    recipe = rankwise.catalog.eva(rank=rank, center=center)
    return started(recipe, statistics_of(torch.zeros(6, N, dtype=torch.float64), inputs=batches), rank).A


def test_1_first_output_is_the_base_and_rows_are_orthonormal() -> None:
    weight = normal(10, 6, N)
    statistics = {SITE: statistics_of(weight, inputs=BATCHES)}
    model, handle = adapted(weight, rankwise.catalog.eva(rank=4), statistics=statistics)
    x = normal(11, 3, N)
    assert torch.equal(model(x), torch.nn.functional.linear(x, weight))
    A = handle.parameterization(SITE).roles()["A"].detach()
    assert float((A @ A.T - torch.eye(4, dtype=torch.float64)).abs().max()) < 1e-5
    assert int(handle.parameterization(SITE).roles()["B"].count_nonzero()) == 0


def test_1_whitening_divides_rows_by_the_root_of_the_singular_value() -> None:
    """The definition's whiten option, against the singular values of the centered data."""
    recipe = rankwise.catalog.eva(rank=4, whiten=True)
    A = started(recipe, statistics_of(torch.zeros(6, N, dtype=torch.float64), inputs=BATCHES), 4).A
    S = torch.linalg.svdvals(CENTERED)
    assert torch.allclose(A.norm(dim=1), S[:4] ** -0.5, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_2_streamed_moments_give_the_svd_of_all_data(rank: int) -> None:
    weight = torch.zeros(6, N, dtype=torch.float64)
    model = layer_model(weight)
    batches = [(batch, torch.zeros(512, dtype=torch.long)) for batch in BATCHES]
    collected = rankwise.collect(model, batches, {Statistic.INPUT_GRAM})
    A = started(rankwise.catalog.eva(rank=rank), collected[SITE], rank).A
    V = torch.linalg.svd(CENTERED, full_matrices=False)[2][:rank].T
    assert sine_of_angle(A.T, V) < 1e-3
    V_uncentered = torch.linalg.svd(torch.cat(BATCHES), full_matrices=False)[2][:rank].T
    assert sine_of_angle(directions(BATCHES, rank, center=False).T, V_uncentered) < 1e-3
    assert sine_of_angle(V_uncentered, V) > 1e-2  # centering is told apart


def test_3_order_of_batches_does_not_matter() -> None:
    forward, backward = directions(BATCHES, 6), directions(BATCHES[::-1], 6)
    assert float((forward - backward).abs().max()) < 1e-6


def test_4_no_projection_keeps_more_variance() -> None:
    rank = 5

    def lost(A: Tensor) -> float:
        return float(((CENTERED - CENTERED @ A.T @ A) ** 2).sum(1).mean())

    found = lost(directions(BATCHES, rank))
    eigenvalues = torch.linalg.eigvalsh(CENTERED.T @ CENTERED / len(CENTERED)).flip(0)
    assert abs(found / float(eigenvalues[rank:].sum()) - 1) < 1e-8
    for seed in range(100):
        assert found <= lost(orthonormal(200 + seed, N, rank).T)


def ratios(count: int, width: int = 8) -> dict[str, Tensor]:
    """Random explained-variance ratios of some layers, descending."""
    variances = {f"l{i}": normal(300 + i, width).abs().sort(descending=True).values for i in range(count)}
    return {site: values / values.sum() for site, values in variances.items()}


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_5_budget_is_spent_exactly(rho: float, rank: int) -> None:
    spectra = ratios(5, 12)
    ranks = ExplainedVariance(rho=rho)(spectra, 5 * rank)
    assert sum(ranks.values()) == 5 * rank
    assert max(ranks.values()) <= round(rho * rank)
    if rho == 1.0:
        assert set(ranks.values()) == {rank}
    # brute force: the largest ratios among the first round(rho r) of every layer
    cap = round(rho * rank)
    pool = sorted(((float(value), site) for site, spectrum in spectra.items() for value in spectrum[:cap]), reverse=True)
    expected = {site: sum(chosen == site for _, chosen in pool[: 5 * rank]) for site in spectra}
    assert {site: ranks.get(site, 0) for site in spectra} == expected


def test_6_one_direction_against_eight() -> None:
    first, second = torch.zeros(8, dtype=torch.float64), torch.full((8,), 1 / 8, dtype=torch.float64)
    first[0] = 1.0
    assert ExplainedVariance(rho=2.0)({"first": first, "second": second}, 8) == {"first": 1, "second": 7}


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_6_ratios_count_and_not_variances(size: float) -> None:
    eye = torch.eye(8, dtype=torch.float64)
    weight = normal(400, 8, 8)
    statistics = {
        "first": statistics_of(weight, inputs=[size * torch.cat([eye[:1], -eye[:1]])], site="first"),
        "second": statistics_of(weight, inputs=[torch.cat([eye, -eye])], site="second"),
    }
    recipe = rankwise.compose("lora(rank=4, alpha=4) + eva(rank=4)")
    assert dict(redistribute(recipe, statistics, rho=2.0, minimum=0).ranks) == {"first": 1, "second": 7}


def test_7_scale_of_every_layer_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(3)])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    rows = normal(1, 64, 8) * torch.tensor([5.0, 3.0, 1, 0.5, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    statistics = rankwise.collect(model, [(rows, torch.zeros(64, dtype=torch.long))], {Statistic.INPUT_GRAM})
    recipe = rankwise.compose("lora(rank=3, alpha=12) + eva(rank=3)")
    moved = redistribute(recipe, statistics, rho=2.0, minimum=1)
    assert len(set(moved.ranks.values())) > 1, "the budget should have moved"
    handle = rankwise.adapt_(model, moved, statistics=statistics)
    entries = [handle.parameterization(site) for site in ("0", "1", "2")]
    assert sum(entry.rank for entry in entries) == 9
    for entry in entries:
        assert entry.scale == pytest.approx(12 / 3, abs=1e-12)  # alpha_l / r_l = alpha / r
