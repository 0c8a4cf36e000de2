"""Where a recipe's learning rate is looked for: a log grid around a prior, short runs first, the better half again for longer.

The grid is widened by one step of the same ratio while the best rate lies at its edge, at most `WIDEN` times, so that a poor
prior costs runs and not the result. The rule is the same for every recipe. Scores are losses: smaller is better, and a run
that diverged scores infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rankwise.core.errors import ArgumentError
from rankwise.core.recipe import Recipe

RATIO = math.sqrt(10.0)  # two rates per decade
WIDEN = 4  # runs added at an edge
SHORT, SHORT_FACTOR = 200, 3.0  # steps below which the prior is larger, and by how much

# Rates from which tuned runs of small and medium models start out: Adam's on factors is about ten times full fine-tuning's,
# vectors and small frozen-basis cores want more, plain SGD much more since its steps are not normalized.
_BY_PARAMETERIZATION = {"Full": 1e-4, "SharedBank": 1e-2, "SmallCore": 3e-3, "TuckerCore": 3e-3}
_BY_PARAMETERIZATION |= {"RandomBasis": 1e-2, "VectorBank": 1e-2, "Recycled": 3e-3, "Subspace": 1e-2}
_BY_STEP = {"sgd": 100.0, "galore": 3.0, "lora_plus": 0.3}
_DEFAULT = 1e-3


def prior(recipe: Recipe, steps: int) -> float:
    """The rate in the middle of the grid, larger for short runs, which end before a careful rate gets anywhere."""
    estimated = recipe.perturbation is not None and recipe.perturbation.factory.forward_only  # type: ignore[attr-defined]
    chain = () if estimated else recipe.step  # the noise of estimates leaves no room for larger rates
    rate = (SHORT_FACTOR if steps < SHORT else 1.0) * _BY_PARAMETERIZATION.get(recipe.parameterization.name, _DEFAULT)
    return rate * math.prod(_BY_STEP.get(step.name, 1.0) for step in chain)


def grid(middle: float, count: int) -> list[float]:
    """`count` rates with the ratio √10, rounded to three digits, around the middle (one more below it if even)."""
    return [_rounded(middle * RATIO ** (index - count // 2)) for index in range(count)]


def checked_rates(rates: Sequence[float]) -> list[float]:
    """The rates a person named, sorted.

    Raises:
        ArgumentError: none, one that is not positive, or one twice.
    """
    found = sorted(float(rate) for rate in rates)
    if not found or found[0] < 1e-30 or not found[-1] <= 1e30 or len(set(found)) != len(found):
        raise ArgumentError(f"learning rates must be different positive numbers, at least one; got {list(rates)}")
    return found


@dataclass
class Sweep:
    """What a sweep found.

    Attributes:
        best: the chosen rate; None where every rate diverged.
        scores: steps of the rung -> rate -> loss.
        at_edge: the best rate is the smallest or largest tried, so a better one may lie beyond.
        steps: training steps spent.
    """

    best: float | None
    scores: dict[int, dict[float, float]] = field(default_factory=dict)
    at_edge: bool = False
    steps: int = 0


def sweep(rates: Sequence[float], rungs: Sequence[int], run: Callable[[float, int], float], *, widen: bool) -> Sweep:
    """Looks for the rate with the smallest loss.

    Args:
        rates: the grid, ascending.
        rungs: steps of the runs, shortest first; after each rung the better half goes on (from the start, for longer).
        run: (rate, steps) -> loss; infinity where it diverged.
        widen: whether rates outside the grid may be tried.
    """
    tried = {rate: run(rate, rungs[0]) for rate in rates}
    if widen:
        for _ in range(WIDEN):
            best = _best(tried)
            low, high = min(tried), max(tried)
            if math.isinf(tried[best]) or best == low:
                tried[_rounded(low / RATIO)] = run(_rounded(low / RATIO), rungs[0])
            elif best == high:
                tried[_rounded(high * RATIO)] = run(_rounded(high * RATIO), rungs[0])
            else:
                break
    found = Sweep(_best(tried), {rungs[0]: dict(sorted(tried.items()))}, steps=rungs[0] * len(tried))
    if math.isinf(min(tried.values())):
        found.best = None
        return found
    for steps in rungs[1:]:
        last = found.scores[max(found.scores)]
        alive = sorted((rate for rate in last if math.isfinite(last[rate])), key=lambda rate: (last[rate], rate))
        kept = sorted(alive[: max(2, math.ceil(len(alive) / 2))])
        scores = {rate: run(rate, steps) for rate in kept}
        found.scores[steps], found.steps = scores, found.steps + steps * len(kept)
        if not math.isinf(scores[_best(scores)]):
            found.best = _best(scores)
    found.at_edge = len(tried) > 1 and found.best in (min(tried), max(tried))
    return found


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda rate: (scores[rate], rate))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
