"""Means with intervals over seeds, paired differences, and the plain statement whether a difference is resolved.

Seeds are the unit of repetition: each gives one number per recipe, on the same batches for every recipe, so differences are
taken seed by seed. The interval of a mean is Student's, mean ± t(n - 1) · s / √n. Several differences are judged together by
Holm's step-down rule, so that the chance of even one false "resolved" stays below 5 %.

Holm: A Simple Sequentially Rejective Multiple Test Procedure, 1979. Student: The Probable Error of a Mean, 1908.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from rankwise.core.errors import ArgumentError


@dataclass(frozen=True)
class Interval:
    """A mean over n values; low and high are None where one value gives no interval."""

    mean: float
    low: float | None
    high: float | None
    deviation: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width."""
        return None if self.high is None else self.high - self.mean


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of the values with its interval.

    Raises:
        ArgumentError: no values, one that is not finite, or a level outside (0, 1).
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ArgumentError(f"an interval needs at least one value and only finite ones; got {list(values)}")
    if not 0 < level < 1:
        raise ArgumentError(f"level is a probability between 0 and 1, not {level}")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = _quantile(level, count) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, deviation, count)


@dataclass(frozen=True)
class Difference:
    """One recipe against another, over the seeds that both have.

    Attributes:
        first, second: names.
        interval: of first - second, seed by seed; None without a common seed.
        p_value: of the paired t test; None where it cannot be taken.
        adjusted: p value after Holm's correction over all differences judged together.
        resolved: adjusted < 1 - level.
        detectable: the smallest mean difference these seeds could have resolved, at the scatter seen; None if unknown.
        reason: why there is no test, where there is none.
    """

    first: str
    second: str
    interval: Interval | None
    p_value: float | None
    adjusted: float | None
    resolved: bool
    detectable: float | None
    reason: str = ""


def paired_differences(values: Mapping[str, Mapping[int, float]], *, level: float = 0.95) -> list[Difference]:
    """All pairs of recipes, judged together.

    Args:
        values: recipe -> seed -> measure.
        level: confidence of the intervals, and 1 - the error rate of the whole family.
    """
    pairs = [_pair(first, second, values[first], values[second], level) for first, second in combinations(values, 2)]
    adjusted = holm([pair.p_value for pair in pairs if pair.p_value is not None])
    taken = iter(adjusted)
    tests = len(adjusted)
    judged = []
    for pair in pairs:
        p = None if pair.p_value is None else next(taken)
        judged.append(
            Difference(
                pair.first,
                pair.second,
                pair.interval,
                pair.p_value,
                p,
                p is not None and p < 1 - level,
                _detectable(pair.interval, level, tests),
                pair.reason,
            )
        )
    return judged


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    count = len(p_values)
    order = sorted(range(count), key=lambda index: p_values[index])
    adjusted, running = [0.0] * count, 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (count - position) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _pair(first: str, second: str, left: Mapping[int, float], right: Mapping[int, float], level: float) -> Difference:
    common = sorted(set(left) & set(right))
    if not common:
        return Difference(first, second, None, None, None, False, None, "they have no finished seed in common")
    gaps = [left[seed] - right[seed] for seed in common]
    interval = mean_interval(gaps, level=level)
    if interval.deviation is None:
        return Difference(first, second, interval, None, None, False, None, "one seed gives no interval")
    if interval.deviation <= 1e-12 * max(abs(value) for seed in common for value in (left[seed], right[seed], 1e-300)):
        # a measure counted on few examples repeats itself; a scatter of zero is then no evidence
        return Difference(first, second, interval, None, None, False, None, "every seed gave the same difference")
    from scipy.stats import t as student

    statistic = interval.mean / (interval.deviation / math.sqrt(interval.count))
    p_value = float(2 * student.sf(abs(statistic), interval.count - 1))
    return Difference(first, second, interval, p_value, None, False, None)


def _detectable(interval: Interval | None, level: float, tests: int) -> float | None:
    if interval is None or not interval.deviation:
        return None
    strict = 1 - (1 - level) / max(tests, 1)
    return _quantile(strict, interval.count) * interval.deviation / math.sqrt(interval.count)


def _quantile(level: float, count: int) -> float:
    from scipy.stats import t as student

    return float(student.ppf((1 + level) / 2, count - 1))
