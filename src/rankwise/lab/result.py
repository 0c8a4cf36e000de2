"""What a comparison found: a row per recipe, the paired differences, and sentences that say what is resolved and what is not.

Everything here is read from the results file, so a table or a report can be made again without training anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from rankwise.core.checkpoint import write_atomically
from rankwise.lab.intervals import Difference, Interval, mean_interval, paired_differences

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One recipe.

    Attributes:
        recipe: as typed.
        learning_rate: chosen by the sweep; None where every rate diverged.
        finished, diverged: seeds.
        metric, loss, retention: over the finished seeds; retention is the rise over the frozen base.
        cost: trained, head and state numbers; FLOPs and saved bytes as multiples of the frozen base's.
        seconds_per_step: median over steps, then over seeds.
        start_seconds: for the start's statistics, per run.
        adapter_bytes: size on disk, head included.
        sweep: rung steps -> rate -> validation loss (None: diverged).
        sweep_steps: spent on looking for the rate.
        at_edge: the chosen rate is the smallest or largest one tried.
        runs: the final runs as recorded.
        note: why there is no result, where there is none.
    """

    recipe: str
    learning_rate: float | None
    finished: int
    diverged: int
    metric: Interval | None
    loss: Interval | None
    retention: Interval | None
    cost: Mapping[str, float]
    seconds_per_step: float | None
    start_seconds: float
    adapter_bytes: int | None
    sweep: Mapping[int, Mapping[float, float | None]]
    sweep_steps: int
    at_edge: bool
    runs: Sequence[Record]
    note: str = ""


@dataclass(frozen=True)
class ComparisonResult:
    """The whole comparison. `statements` are the sentences, `winner` the recipe with the best mean."""

    metric_name: str
    higher_is_better: bool
    rows: Sequence[Row]
    differences: Sequence[Difference]
    statements: Sequence[str]
    winner: str | None
    base: Mapping[str, Any]
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    out: Path
    report: Path | None = None
    level: float = 0.95
    extra: Mapping[str, Any] = field(default_factory=dict)

    def row(self, recipe: str) -> Row:
        """The row of a recipe."""
        return next(row for row in self.rows if row.recipe == recipe)

    def ranked(self) -> list[Row]:
        """Rows from the best mean to the worst, those without a result last."""
        sign = -1.0 if self.higher_is_better else 1.0
        return sorted(
            self.rows, key=lambda row: (row.metric is None, row.diverged, sign * row.metric.mean if row.metric else 0.0)
        )

    def save(self, path: Path) -> None:
        """Writes table, differences and sentences as JSON."""
        data = {
            "metric": self.metric_name,
            "winner": self.winner,
            "statements": list(self.statements),
            "rows": [{**row.__dict__, **_plain(row), "runs": [_short(run) for run in row.runs]} for row in self.rows],
            "differences": [
                {**difference.__dict__, "interval": _interval(difference.interval)} for difference in self.differences
            ],
            "base": dict(self.base),
            "settings": dict(self.settings),
            "about": dict(self.about),
        }
        write_atomically(path, json.dumps(data, indent=1))


def _plain(row: Row) -> dict[str, Any]:
    return {
        "metric": _interval(row.metric),
        "loss": _interval(row.loss),
        "retention": _interval(row.retention),
        "cost": dict(row.cost),
        "sweep": {str(steps): {f"{rate:g}": loss for rate, loss in scores.items()} for steps, scores in row.sweep.items()},
    }


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.__dict__


def _short(run: Record) -> Record:
    return {key: value for key, value in run.items() if key not in ("curve", "spectra")}


def make_row(recipe: str, runs: Sequence[Record], sweep: Mapping[str, Any], cost: Mapping[str, float], metric_name: str) -> Row:
    """The row of a recipe from its final runs, its sweep and its counted cost."""
    finished = [run for run in runs if run["outcome"] == "finished"]
    speeds = [run["seconds_per_step"] for run in finished if run["seconds_per_step"]]
    sizes = [run["adapter_bytes"] for run in finished]
    note = ""
    if sweep["best"] is None:
        note = "every learning rate diverged"
    elif not finished:
        note = f"every seed diverged at {sweep['best']:g}"
    return Row(
        recipe=recipe,
        learning_rate=sweep["best"],
        finished=len(finished),
        diverged=len(runs) - len(finished),
        metric=_over([run["metrics"][metric_name] for run in finished]),
        loss=_over([run["metrics"]["loss"] for run in finished if "loss" in run["metrics"]]),
        retention=_over([run["retention"] for run in finished if run["retention"] is not None]),
        cost=cost,
        seconds_per_step=median(speeds) if speeds else None,
        start_seconds=median(run["start_seconds"] for run in finished) if finished else 0.0,
        adapter_bytes=sizes[0] if sizes else None,
        sweep={int(steps): {float(rate): loss for rate, loss in scores} for steps, scores in sweep["scores"]},
        sweep_steps=sweep["steps"],
        at_edge=sweep["at_edge"],
        runs=runs,
        note=note,
    )


def _over(values: Sequence[float]) -> Interval | None:
    return mean_interval(values) if values else None


def judge(rows: Sequence[Row], metric_name: str, higher_is_better: bool) -> tuple[list[Difference], str | None, list[str]]:
    """The paired differences, the winner, and the sentences."""
    values = {
        row.recipe: {run["seed"]: run["metrics"][metric_name] for run in row.runs if run["outcome"] == "finished"}
        for row in rows
    }
    differences = paired_differences({recipe: seeds for recipe, seeds in values.items() if seeds})
    sign = -1.0 if higher_is_better else 1.0
    candidates = [row for row in rows if row.metric is not None]
    best = min(candidates, key=lambda row: (row.diverged, sign * row.metric.mean) if row.metric else (0, 0.0), default=None)
    sentences = [_about_rate(row) for row in rows if row.at_edge or row.note or row.diverged]
    sentences += _twins(rows) + [f"{row.recipe}: {why}." for row in rows if (why := row.runs and row.runs[0].get("unfinished"))]
    if best is None or best.metric is None:
        return differences, None, ["No recipe finished a run, so there is nothing to compare.", *sentences]
    count = best.metric.count
    opening = (
        f"{best.recipe} has the best mean {metric_name}: {_said(best.metric)} over {count} seed{'s' if count > 1 else ''}."
    )
    against = [gap for gap in differences if best.recipe in (gap.first, gap.second)]
    verdicts = [_verdict(best.recipe, gap, metric_name, higher_is_better, len(differences)) for gap in against]
    closing = []
    if against and not any(gap.resolved for gap in against):
        closing = ["So no recipe is shown to be better here: choose by cost, or run more seeds or steps."]
    return differences, best.recipe, [opening, *verdicts, *closing, *sentences]


def _verdict(best: str, gap: Difference, metric: str, higher: bool, tests: int) -> str:
    other = gap.second if gap.first == best else gap.first
    sign = (1.0 if gap.first == best else -1.0) * (1.0 if higher else -1.0)
    if gap.interval is None:
        return f"NOT resolved: {best} against {other}; {gap.reason}."
    lead = sign * gap.interval.mean
    if gap.interval.low is None or gap.interval.high is None:
        return f"NOT resolved: {best} leads {other} by {lead:.4f}, but {gap.reason}; use --seeds 3 or more."
    low, high = sorted((sign * gap.interval.low, sign * gap.interval.high))
    numbers = f"by {lead:.4f} {metric}, 95 % interval [{low:.4f}, {high:.4f}]"
    if gap.p_value is None or gap.adjusted is None:
        return f"NOT resolved: {best} leads {other} {numbers}, but {gap.reason}, which is no evidence about scatter."
    test = f"p = {gap.adjusted:.3f} after Holm's correction for {tests} comparison{'s' if tests > 1 else ''}"
    if gap.resolved:
        return f"Resolved: {best} is better than {other} {numbers}; {test}."
    reach = "" if gap.detectable is None else f" These {gap.interval.count} seeds could have shown about {gap.detectable:.3f}."
    return f"NOT resolved: {best} leads {other} {numbers}; {test}.{reach}"


def _twins(rows: Sequence[Row]) -> list[str]:
    """A sentence for every two recipes that trained the same to the last digit: a piece of one of them never acted."""
    return [
        f"{one.recipe} and {other.recipe} trained identically: what sets them apart never acted in this many steps."
        for one, other in combinations([row for row in rows if row.finished], 2)
        if one.learning_rate == other.learning_rate
        and [run["curve"] for run in one.runs] == [run["curve"] for run in other.runs]
    ]


def _about_rate(row: Row) -> str:
    if row.note:
        return f"{row.recipe} has no result: {row.note}."
    if row.diverged:
        return f"{row.recipe} diverged on {row.diverged} of {row.diverged + row.finished} seeds; its mean is over the rest."
    return f"{row.recipe}: the chosen rate {row.learning_rate:g} is at the edge of those tried; a better one may lie beyond."


def _said(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.4f}"
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
