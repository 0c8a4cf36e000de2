"""The plots of the report as plain plotly JSON: each a title, a sentence on how to read it, traces and a layout.

Colors are Okabe and Ito's, which color-blind people tell apart, kept per recipe through all plots; lines and points carry
their names beside them, so that no legend has to be matched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rankwise.lab.captions import CAPTIONS
from rankwise.lab.figures_cost import costs, rates, retention
from rankwise.lab.plots import INK, Palette, axis, broken, end_labels, layout, log_ticks, points, running_mean
from rankwise.lab.result import ComparisonResult, Row
from rankwise.lab.spectra_figure import spectra

Figure = dict[str, Any]


def figures(found: ComparisonResult, palette: Palette) -> dict[str, Figure]:
    """Name -> figure, in the order of the page; those without anything to show are left out."""
    done = [row for row in found.ranked() if row.metric is not None]
    made = {
        "ranking": ranking(found, done, palette),
        "curves": curves(done, palette),
        "size": against_size(found, done, palette),
        "rates": rates(found, palette),
        "costs": costs(done, palette),
        "retention": retention(found, done, palette),
        "spectra": spectra(found, done),
    }
    return {
        name: {"title": CAPTIONS[name][0], "text": CAPTIONS[name][1], **figure}
        for name, figure in made.items()
        if figure is not None
    }


def ranking(found: ComparisonResult, done: Sequence[Row], palette: Palette) -> Figure | None:
    """Means with intervals and seeds on the left, seed-by-seed differences from the best on the right."""
    if not done:
        return None
    traces: list[Any] = []
    for row in done:
        seeds = [run["metrics"][found.metric_name] for run in row.runs if run["outcome"] == "finished"]
        name, color = broken(row.recipe), palette.color(row.recipe)
        traces.append(
            {
                **points(seeds, [name] * len(seeds), color, opacity=0.35, size=8),
                "hovertemplate": "one seed: %{x:.4f}<extra>" + row.recipe + "</extra>",
            }
        )
        half = row.metric.half_width if row.metric else None
        traces.append(
            {
                **points([row.metric.mean] if row.metric else [], [name], color, size=12),
                "error_x": {"array": [half or 0], "color": color, "thickness": 2.5, "width": 0},
                "hovertemplate": f"mean %{{x:.4f}} ± {half or 0:.4f}<extra>{row.recipe}</extra>",
            }
        )
    best = done[0].recipe
    for gap in found.differences:
        if best not in (gap.first, gap.second) or gap.interval is None:
            continue
        other = gap.second if gap.first == best else gap.first
        sign = -1.0 if gap.first == best else 1.0
        color = palette.color(other)
        said = "resolved" if gap.resolved else "not resolved"
        traces.append(
            {
                **points(
                    [sign * gap.interval.mean],
                    [broken(other)],
                    color,
                    size=12,
                    symbol="circle" if gap.resolved else "circle-open",
                ),
                "xaxis": "x2",
                "error_x": {"array": [gap.interval.half_width or 0], "color": color, "thickness": 2.5, "width": 0},
                "hovertemplate": f"%{{x:.4f}} ± {gap.interval.half_width or 0:.4f}, {said}<extra>{other} − {best}</extra>",
            }
        )
    names = [broken(row.recipe) for row in done]
    shape = {
        "type": "line",
        "xref": "x2",
        "yref": "paper",
        "x0": 0,
        "x1": 0,
        "y0": 0,
        "y1": 1,
        "line": {"color": INK, "width": 1},
    }
    return {
        "data": traces,
        "layout": layout(
            120 + 52 * len(done),
            xaxis=axis(title=found.metric_name, domain=[0, 0.56]),
            xaxis2=axis(title=f"difference from {best}", domain=[0.62, 1], anchor="y"),
            yaxis=axis(
                categoryorder="array", categoryarray=names[::-1], showgrid=False, automargin=True, range=[-0.6, len(done) - 0.4]
            ),
            shapes=[shape],
        ),
    }


def curves(done: Sequence[Row], palette: Palette) -> Figure | None:
    """Training loss with a band over seeds."""
    traces, ends = [], []
    for row in done:
        runs = [run["curve"] for run in row.runs if run["outcome"] == "finished"]
        length = min(map(len, runs))
        smooth = [running_mean(run[:length], max(1, length // 12)) for run in runs]
        steps = list(range(1, length + 1))
        low, high = [list(map(pick, zip(*smooth, strict=True))) for pick in (min, max)]
        mean = [sum(values) / len(values) for values in zip(*smooth, strict=True)]
        color = palette.color(row.recipe)
        band = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        traces += [
            {**band, "x": steps, "y": low},
            {**band, "x": steps, "y": high, "fill": "tonexty", "fillcolor": palette.pale(row.recipe)},
            {
                "type": "scatter",
                "mode": "lines",
                "x": steps,
                "y": mean,
                "name": row.recipe,
                "line": {"color": color, "width": 2.5},
                "showlegend": False,
                "hovertemplate": "%{y:.4f}",
            },
        ]
        ends.append((row.recipe, float(length), mean[-1], color))
    if not traces:
        return None
    every = [value for trace in traces for value in trace["y"]]
    right, annotations = end_labels(ends, min(every), max(every), 380)
    return {
        "data": traces,
        "layout": layout(
            460,
            right=right,
            xaxis=axis(title="step", showgrid=False, range=[1, max(end[1] for end in ends)]),
            yaxis=axis(title="loss"),
            annotations=annotations,
            hovermode="x unified",
        ),
    }


def against_size(found: ComparisonResult, done: Sequence[Row], palette: Palette) -> Figure | None:
    """The measure against trained numbers; recipes of about one size stand side by side, named on the right of their group."""
    if not done:
        return None
    tops = [end for row in done if row.metric for end in (row.metric.low, row.metric.high, row.metric.mean) if end is not None]
    low, high = min(tops), max(tops)
    traces, annotations = [], []
    for group in _groups(done):
        places = [
            math.exp(math.fsum(math.log(row.cost["trained"]) for row in group) / len(group)) * 1.03**index
            for index in range(len(group))
        ]
        ends = []
        for row, place in zip(group, places, strict=True):
            if row.metric is None:
                continue
            half, color = row.metric.half_width or 0.0, palette.color(row.recipe)
            traces.append(
                {
                    **points([place], [row.metric.mean], color, size=12),
                    "error_y": {"array": [half], "color": color, "thickness": 2.5, "width": 0},
                    "hovertemplate": f"{row.cost['trained']:,.0f} numbers<br>%{{y:.4f}}<extra>{row.recipe}</extra>",
                }
            )
            ends.append((row.recipe, math.log10(places[-1]), row.metric.mean, color))
        annotations += end_labels(ends, low, high, 360)[1]
    sizes = [float(row.cost["trained"]) for row in done]
    span = max(0.3, 0.15 * math.log10(max(sizes) / min(sizes)))
    left, right = math.log10(min(sizes)) - span, math.log10(max(sizes)) + 2 * span
    return {
        "data": traces,
        "layout": layout(
            460,
            xaxis=axis(title="trained numbers, without the head", type="log", range=[left, right], **log_ticks(left, right)),
            yaxis=axis(title=found.metric_name),
            annotations=annotations,
        ),
    }


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows whose trained numbers are within a fifth of each other, smallest first."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.cost["trained"]):
        if groups and row.cost["trained"] < 1.2 * groups[-1][0].cost["trained"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
