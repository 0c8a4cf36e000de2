"""Intervals and tests against scipy, Holm against its definition, and what must never be called resolved."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rankwise.core.errors import ArgumentError
from rankwise.lab.intervals import holm, mean_interval, paired_differences


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_is_scipys(count: int, level: float) -> None:
    values = np.random.default_rng(count).normal(size=count)
    interval = mean_interval(values.tolist(), level=level)
    low, high = stats.t.interval(level, count - 1, values.mean(), stats.sem(values))
    assert math.isclose(interval.low or 0, low)
    assert math.isclose(interval.high or 0, high)
    assert math.isclose(interval.deviation or 0, values.std(ddof=1))


def test_one_value_has_no_interval_and_nan_is_refused() -> None:
    assert mean_interval([0.5]).low is None
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ArgumentError, match="finite"):
            mean_interval(bad)
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        mean_interval([1.0, 2.0], level=95)


def test_paired_p_values_are_scipys_and_pairing_by_seed_matters() -> None:
    random = np.random.default_rng(3)
    seeds = random.normal(0, 5, size=6)  # seeds differ far more than recipes
    first, second = seeds + random.normal(0.5, 0.1, 6), seeds + random.normal(0, 0.1, 6)
    shuffled = dict(sorted(enumerate(second.tolist()), key=lambda pair: -pair[0]))
    (gap,) = paired_differences({"a": dict(enumerate(first.tolist())), "b": shuffled})
    assert math.isclose(gap.p_value or 0, stats.ttest_rel(first, second).pvalue)
    assert gap.adjusted == gap.p_value
    assert gap.resolved
    assert stats.ttest_ind(first, second).pvalue > 0.5
    assert gap.interval is not None
    assert math.isclose(gap.interval.mean, float((first - second).mean()))


def test_holm_on_a_worked_case_and_monotone() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_correction_can_take_a_resolved_pair_back() -> None:
    random = np.random.default_rng(5)
    base = random.normal(size=5)
    near = base - 0.2 + random.normal(0, 0.12, 5)
    alone = paired_differences({"a": dict(enumerate(base)), "b": dict(enumerate(near))})[0]
    assert alone.resolved
    crowd = {"a": dict(enumerate(base)), "b": dict(enumerate(near))}
    crowd |= {f"c{index}": dict(enumerate(base + random.normal(0, 1, 5))) for index in range(6)}
    together = next(gap for gap in paired_differences(crowd) if (gap.first, gap.second) == ("a", "b"))
    assert together.p_value == alone.p_value
    assert not together.resolved


def test_false_resolutions_stay_below_five_percent() -> None:
    random = np.random.default_rng(11)
    wrong = 0
    for _ in range(300):
        values = {name: dict(enumerate(random.normal(size=4).tolist())) for name in "abcd"}
        wrong += any(gap.resolved for gap in paired_differences(values))
    assert wrong / 300 < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)


def test_no_scatter_no_common_seed_and_one_seed_are_not_resolved() -> None:
    same = paired_differences({"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.4, 1: 0.5, 2: 0.6}})[0]
    assert not same.resolved
    assert "same difference" in same.reason
    apart = paired_differences({"a": {0: 1.0}, "b": {1: 1.0}})[0]
    assert apart.interval is None
    assert "no finished seed in common" in apart.reason
    single = paired_differences({"a": {0: 1.0}, "b": {0: 2.0}})[0]
    assert not single.resolved
    assert "one seed" in single.reason


def test_detectable_is_where_the_test_turns() -> None:
    values = {"a": {0: 1.0, 1: 1.3, 2: 0.8, 3: 1.1}, "b": {0: 0.9, 1: 1.0, 2: 0.9, 3: 0.8}}
    gap = paired_differences(values)[0]
    assert gap.interval is not None
    assert gap.detectable is not None
    for factor, expected in ((1.01, True), (0.99, False)):
        shift = factor * gap.detectable - gap.interval.mean
        moved = {"a": {seed: value + shift for seed, value in values["a"].items()}, "b": values["b"]}
        assert paired_differences(moved)[0].resolved is expected
