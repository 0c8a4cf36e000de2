"""Plots of the report about tuning and price: learning rates, costs, and what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rankwise.lab.plots import COLUMN, GRID, SOFT, Palette, axis, broken, dodged, end_labels, layout, log_ticks, points
from rankwise.lab.result import ComparisonResult, Row
from rankwise.lab.terminal import bytes_text

Figure = dict[str, Any]


def rates(found: ComparisonResult, palette: Palette) -> Figure | None:
    """Validation loss against the learning rate, one line per recipe and rung."""
    known = [loss for row in found.rows for scores in row.sweep.values() for loss in scores.values() if loss is not None]
    if not known:
        return None
    start = min(known)
    ceiling = (
        min(max(known), start + 4 * (sorted(known)[len(known) // 2] - start + 1e-9)) * 1.02
    )  # outliers are cut, not hidden
    traces, ends = [], []
    for row in found.rows:
        color = palette.color(row.recipe)
        for rung, (steps, scores) in enumerate(sorted(row.sweep.items())):
            last = rung == len(row.sweep) - 1
            cut = [loss is None or loss > ceiling for loss in scores.values()]
            shown = [ceiling if off else loss for off, loss in zip(cut, scores.values(), strict=True)]
            said = ["diverged" if loss is None else f"{loss:.4f}" for loss in scores.values()]
            chosen = [last and rate == row.learning_rate for rate in scores]
            marker = {
                "color": color,
                "size": [14 if best else 7 for best in chosen],
                "symbol": ["x" if off else "circle" for off in cut],
                "opacity": 1 if last else 0.5,
            }
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": list(scores),
                    "y": shown,
                    "customdata": said,
                    "marker": marker,
                    "line": {"color": color, "width": 2.5 if last else 1.2, "dash": "solid" if last else "dot"},
                    "showlegend": False,
                    "hovertemplate": f"rate %{{x:.3g}}: %{{customdata}}<br>after {steps} steps<extra>{row.recipe}</extra>",
                }
            )
            if rung == 0:
                ends.append((row.recipe, math.log10(max(scores)), shown[-1] or 0.0, color))
    limit = max(end[1] for end in ends)
    lowest = math.log10(min(rate for row in found.rows for scores in row.sweep.values() for rate in scores))
    right, annotations = end_labels([(name, limit, height, color) for name, _, height, color in ends], start, ceiling, 360)
    return {
        "data": traces,
        "layout": layout(
            440,
            right=right,
            xaxis=axis(
                title="learning rate", type="log", showgrid=False, range=[lowest - 0.1, limit + 0.1], **log_ticks(lowest, limit)
            ),
            yaxis=axis(title="validation loss"),
            annotations=annotations,
        ),
    }


def costs(done: Sequence[Row], palette: Palette) -> Figure | None:
    """Four panels of bars: counted FLOPs and bytes, measured seconds, size on disk."""
    if not done:
        return None
    panels = [
        ("FLOPs (× frozen base)", [row.cost["relative_flops"] for row in done], lambda value: f"×{value:.2f}"),
        (
            "saved for backward (× frozen base)",
            [row.cost["relative_saved_bytes"] for row in done],
            lambda value: f"×{value:.2f}",
        ),
        ("seconds per step", [row.seconds_per_step or 0.0 for row in done], lambda value: f"{value:.3f}"),
        ("size on disk", [float(row.adapter_bytes or 0) for row in done], bytes_text),
    ]
    names, traces, annotations, axes = [broken(row.recipe) for row in done], [], [], {}
    for index, (title, values, text) in enumerate(panels):
        suffix = "" if index == 0 else str(index + 1)
        left = index * (COLUMN + (1 - 4 * COLUMN) / 3)
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": values,
                "y": names,
                "xaxis": f"x{suffix}",
                "text": [text(value) for value in values],
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {"color": [palette.color(row.recipe) for row in done]},
                "hovertemplate": f"%{{text}}<extra>%{{y}}: {title}</extra>",
                "showlegend": False,
            }
        )
        axes[f"xaxis{suffix}"] = axis(
            domain=[left, left + COLUMN],
            range=[0, 1.45 * max(values, default=1) or 1],
            showticklabels=False,
            showgrid=False,
            anchor="y",
        )
        annotations.append(
            {"x": left, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom", "yshift": 6}
            | {"text": title.replace(" (", "<br>("), "align": "left", "showarrow": False, "font": {"size": 13, "color": SOFT}}
        )
    return {
        "data": traces,
        "layout": layout(
            120 + 46 * len(done),
            top=56,
            bottom=16,
            yaxis=axis(categoryorder="array", categoryarray=names[::-1], showgrid=False, automargin=True),
            annotations=annotations,
            bargap=0.35,
            **axes,
        ),
    }


def retention(found: ComparisonResult, done: Sequence[Row], palette: Palette) -> Figure | None:
    """What was learned against what was forgotten."""
    kept = [row for row in done if row.retention is not None and row.metric is not None]
    if not kept:
        return None
    traces = []
    for row in kept:
        assert row.retention is not None
        assert row.metric is not None
        color = palette.color(row.recipe)
        place = points([row.retention.mean], [row.metric.mean], color, size=12)
        traces.append(
            {
                **place,
                "error_x": {"array": [row.retention.half_width or 0], "color": color, "thickness": 1.5, "width": 0},
                "error_y": {"array": [row.metric.half_width or 0], "color": color, "thickness": 1.5, "width": 0},
                "hovertemplate": f"forgets %{{x:+.4f}}, {found.metric_name} %{{y:.4f}}<extra>{row.recipe}</extra>",
            }
        )
    means = [row.metric.mean for row in kept if row.metric]
    ends = [end for row in kept if row.metric for end in (row.metric.low, row.metric.high, row.metric.mean) if end is not None]
    heights = dodged(means, 0.055 * (max(ends) - min(ends)))
    annotations = [
        {"x": row.retention.mean, "y": height, "text": row.recipe, "showarrow": False}
        | {"xanchor": "left", "yanchor": "bottom", "xshift": 10, "yshift": 4, "bgcolor": "rgba(255,255,255,0.8)"}
        | {"font": {"color": palette.color(row.recipe), "size": 13}}
        for row, height in zip(kept, heights, strict=True)
        if row.retention
    ]
    return {
        "data": traces,
        "layout": layout(
            440,
            right=120,
            annotations=annotations,
            xaxis=axis(title="forgets: rise over the frozen base", zeroline=True, zerolinecolor=GRID),
            yaxis=axis(title=found.metric_name),
        ),
    }
