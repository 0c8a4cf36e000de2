"""The search for a learning rate on known loss curves: it finds the minimum, widens, and counts what it spends."""

from __future__ import annotations

import math

import pytest

from rankwise import compose
from rankwise.core.errors import ArgumentError
from rankwise.lab.sweep import RATIO, WIDEN, checked_rates, grid, prior, sweep


def bowl(center: float):
    return lambda rate, steps: (math.log10(rate) - math.log10(center)) ** 2 + 1 / steps


def test_grid_is_half_decades_around_the_middle() -> None:
    assert grid(1e-3, 5) == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert len(grid(1.0, 4)) == 4


def test_minimum_inside_the_grid_without_widening() -> None:
    found = sweep(grid(1e-3, 5), (10, 20), bowl(1.1e-3), widen=True)
    assert found.best == 1e-3
    assert not found.at_edge
    assert len(found.scores[10]) == 5
    assert len(found.scores[20]) == 3
    assert found.steps == 5 * 10 + 3 * 20


@pytest.mark.parametrize("center", [2e-2, 3e-5])
def test_widens_toward_a_minimum_outside(center: float) -> None:
    found = sweep(grid(1e-3, 5), (10, 20), bowl(center), widen=True)
    assert abs(math.log10(found.best or 1) - math.log10(center)) <= math.log10(RATIO) / 2 + 1e-3
    assert not found.at_edge


def test_widening_ends_and_says_that_the_best_is_at_the_edge() -> None:
    found = sweep(grid(1e-3, 3), (10,), lambda rate, steps: 1 / rate, widen=True)
    assert len(found.scores[10]) == 3 + WIDEN
    assert found.at_edge
    assert sweep([1e-3, 1e-2], (10,), lambda rate, steps: 1 / rate, widen=False).at_edge


def test_divergence_at_large_rates_is_stepped_around() -> None:
    found = sweep(grid(1e-1, 3), (4, 8), lambda rate, steps: math.inf if rate > 5e-3 else bowl(1e-3)(rate, steps), widen=True)
    assert found.best == pytest.approx(1e-3, rel=0.1)


def test_every_rate_diverged() -> None:
    found = sweep(grid(1.0, 3), (4, 8), lambda rate, steps: math.inf, widen=True)
    assert found.best is None
    assert set(found.scores) == {4}


def test_longer_runs_decide() -> None:
    table = {4: {1e-3: 1.0, 1e-2: 1.1, 1e-1: 3.0}, 8: {1e-3: 0.9, 1e-2: 0.5, 1e-1: 0.0}}
    found = sweep([1e-3, 1e-2, 1e-1], (4, 8), lambda rate, steps: table[steps][rate], widen=False)
    assert found.best == 1e-2
    assert 1e-1 not in found.scores[8]


def test_priors_know_scale_of_steps_and_full_weights() -> None:
    rates = [prior(compose(text), 1000) for text in ("full", "lora", "lora + sgd")]
    assert rates == sorted(rates)
    assert prior(compose("lora"), 50) > prior(compose("lora"), 5000)
    assert rates[2] >= 10 * rates[1] >= 100 * rates[0] / 2


@pytest.mark.parametrize("rates", [[], [0.0], [1e-3, 1e-3], [-1.0], [math.inf]])
def test_bad_rates_are_refused(rates: list[float]) -> None:
    with pytest.raises(ArgumentError, match="positive numbers"):
        checked_rates(rates)
