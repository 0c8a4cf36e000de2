"""The intrinsic dimension of a task: the fewest dimensions of a random subspace in which training reaches a share of its score.

Full training and every dimension are recipes of one comparison: each looks for its own learning rate, all run on the same
seeds and batches, everything is kept and continued as `compare` does. What comes on top is the reading: the smallest dimension
whose mean reaches the share. A classification head that the task trains whole is trained beside every subspace.

Li, Farkhoor, Liu, Yosinski: Measuring the Intrinsic Dimension of Objective Landscapes, 2018, arXiv:1804.08838.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rankwise.core.checkpoint import write_atomically
from rankwise.core.errors import ArgumentError
from rankwise.lab.intervals import Interval
from rankwise.lab.page import document, section
from rankwise.lab.plots import INK, SOFT, Palette, axis, layout, log_ticks, points
from rankwise.lab.result import ComparisonResult
from rankwise.lab.terminal import interval_text

FULL, NAME = "full", "intrinsic-dimension"
DEFAULT = (10, 10_000, 7)  # smallest, largest and number of dimensions


@dataclass(frozen=True)
class Reading:
    """What a search found.

    Attributes:
        metric: the measure, and whether a higher one is better.
        share: of the full score that has to be reached.
        full: score of full training, the mean over seeds.
        target: the score to reach.
        scores: (dimension, mean score or None where all seeds diverged), ascending.
        dimension: the smallest that reaches the target; None where none does.
        monotone: whether no larger dimension of the sweep falls below the target again.
    """

    metric: str
    higher_is_better: bool
    share: float
    full: float
    target: float
    scores: tuple[tuple[int, float | None], ...]
    dimension: int | None
    monotone: bool

    def __str__(self) -> str:
        goal = f"{self.target:.4f} {self.metric} ({100 * self.share:g} % of full training's {self.full:.4f})"
        tried = [dimension for dimension, _ in self.scores]
        if self.dimension is None:
            return f"none of the dimensions {tried[0]} to {tried[-1]} reaches {goal}; try larger ones"
        text = f"intrinsic dimension {self.dimension}: the smallest of {len(tried)} tried that reaches {goal}"
        if self.dimension == tried[0]:
            text += "; smaller ones were not tried, so it is an upper bound"
        return text if self.monotone else text + "; a larger one falls below it again, so take more seeds"


def search(score: Callable[[int], float | None], dimensions: Sequence[int], target: float) -> int | None:
    """The smallest dimension whose score reaches the target, or None.

    Args:
        score: dimension -> score, higher is better; None where training failed.
        dimensions: to try, in ascending order; the search stops at the first that is enough.
        target: the score to reach.

    Raises:
        ArgumentError: no dimensions, or not in ascending order.
    """
    for dimension in _ascending(dimensions):
        reached = score(dimension)
        if reached is not None and reached >= target:
            return dimension
    return None


def log_spaced(smallest: int, largest: int, count: int) -> list[int]:
    """`count` whole dimensions with about the same ratio between neighbors, fewer where rounding makes two equal."""
    if not 1 <= smallest <= largest or count < 1:
        raise ArgumentError(f"dimensions go from 1 on upwards; got {smallest} to {largest}, {count} of them")
    steps = max(1, count - 1)
    return sorted({round(smallest * (largest / smallest) ** (k / steps)) for k in range(count)})


def recipe_of(dimension: int, projection: str) -> str:
    """The text of the recipe at one dimension."""
    return f"intrinsic_dimension(dimension={dimension}, projection={projection!r})"


def read(found: ComparisonResult, dimensions: Sequence[int], projection: str, share: float) -> Reading:
    """Reads a comparison of full training with subspaces.

    Raises:
        ArgumentError: full training has no score to compare with.
    """
    sign = 1.0 if found.higher_is_better else -1.0
    full = found.row(FULL).metric
    if full is None or not full.mean > 0:
        raise ArgumentError(
            f"full training has no positive {found.metric_name} to take a share of ({found.row(FULL).note or full}); "
            "name smaller rates with --lrs, or train longer"
        )
    target = full.mean * share if found.higher_is_better else full.mean / share
    means: dict[int, float | None] = {}
    for dimension in _ascending(dimensions):
        metric = found.row(recipe_of(dimension, projection)).metric
        means[dimension] = None if metric is None else metric.mean
    reached = [mean is not None and sign * mean >= sign * target for mean in means.values()]
    smallest = search(lambda d: None if means[d] is None else sign * means[d], list(means), sign * target)  # type: ignore[operator]
    monotone = smallest is None or all(reached[list(means).index(smallest) :])
    return Reading(
        found.metric_name, found.higher_is_better, share, full.mean, target, tuple(means.items()), smallest, monotone
    )


def run(given: Mapping[str, Any], command: str = "") -> Reading:
    """Runs the search that the options describe, and writes intrinsic-dimension.json and .html beside the comparison.

    Args:
        given: options of `compare` without recipes, and dimensions, projection and share.
        command: as typed, for the reports.
    """
    from rankwise.lab import compare_command

    share, projection = float(given.get("share") or 0.9), str(given.get("projection") or "fastfood")
    if not 0 < share <= 1:
        raise ArgumentError(f"share is above 0 and at most 1, not {share}")
    dimensions = _ascending(sorted(given.get("dimensions") or log_spaced(*DEFAULT)))
    recipes = [FULL, *(recipe_of(dimension, projection) for dimension in dimensions)]
    found = compare_command.run({**given, "recipes": recipes}, command)
    reading = read(found, dimensions, projection, share)
    write_atomically(found.out / f"{NAME}.json", json.dumps(asdict(reading), indent=1))
    write_atomically(found.out / f"{NAME}.html", page(reading, found, projection))
    return reading


def page(reading: Reading, found: ComparisonResult, projection: str) -> str:
    """The page: one sentence, one plot, one table."""
    drawn = {"dimensions": figure(reading, found, projection)}
    rows = "".join(
        f"<tr><th>{name}</th><td>{'–' if metric is None else interval_text(metric)}</td></tr>"
        for name, metric in [("full training", found.row(FULL).metric)]
        + [(f"{dimension:,}", found.row(recipe_of(dimension, projection)).metric) for dimension, _ in reading.scores]
    )
    title = "Intrinsic dimension of " + str(found.settings.get("task data", "a task"))
    body = [
        f'<header><p class="kicker">rankwise {NAME}</p><h1>{html.escape(title)}</h1></header>',
        f'<section class="findings"><p class="lead">{html.escape(str(reading))}</p></section>',
        section("dimensions", drawn["dimensions"]),
        '<section><h2>The table</h2><div class="scroll"><table><thead><tr><th>dimension</th>'
        f"<th>{html.escape(reading.metric)}</th></tr></thead><tbody>{rows}</tbody></table></div></section>",
    ]
    return document(title, body, drawn)


def figure(reading: Reading, found: ComparisonResult, projection: str) -> dict[str, Any]:
    """Scores against the dimension, with their intervals, full training and the target as lines."""
    color = Palette([FULL]).color(FULL)
    done: list[tuple[int, Interval]] = []
    for dimension, _ in reading.scores:
        metric = found.row(recipe_of(dimension, projection)).metric
        if metric is not None:
            done.append((dimension, metric))
    x, y = [dimension for dimension, _ in done], [metric.mean for _, metric in done]
    halves = [metric.half_width or 0.0 for _, metric in done]
    trace = {**points(x, y, color, size=11), "mode": "lines+markers", "line": {"color": color, "width": 2}}
    trace |= {"error_y": {"array": halves, "color": color}, "hovertemplate": "%{x} dimensions: %{y:.4f}<extra></extra>"}
    lines, notes = [], []
    for height, text, ink in ((reading.full, "full training", INK), (reading.target, f"{100 * reading.share:g} %", SOFT)):
        lines.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": {"color": ink}})
        notes.append(
            {"xref": "paper", "x": 1, "y": height, "text": text, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
        )
    low, high = math.log10(reading.scores[0][0]), math.log10(reading.scores[-1][0])
    horizontal = axis(title="dimensions of the random subspace", type="log", **log_ticks(low, high))
    shown = layout(420, xaxis=horizontal, yaxis=axis(title=reading.metric), shapes=lines, annotations=notes)
    return {
        "title": "How many dimensions the task needs",
        "text": "Each point is the mean over seeds at the learning rate found for that dimension, bars are 95 % intervals.",
        "data": [trace],
        "layout": shown,
    }


def _ascending(dimensions: Sequence[int]) -> list[int]:
    found = [int(dimension) for dimension in dimensions]
    if not found or found[0] < 1 or any(later <= earlier for earlier, later in pairwise(found)):
        raise ArgumentError(f"dimensions are whole numbers from 1 on, in ascending order, none twice; got {list(dimensions)}")
    return found
