"""The heat map of singular values per layer, with the effective rank beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.lab.plots import SOFT, axis, layout
from rankwise.lab.result import ComparisonResult, Row


def spectra(found: ComparisonResult, done: Sequence[Row]) -> dict[str, Any] | None:
    """Singular values of the update per layer for every recipe, the winner's shown first; None without any."""
    known = {row.recipe: seen for row in done for run in row.runs if (seen := run.get("spectra"))}
    if not known:
        return None
    first = found.winner if found.winner in known else next(iter(known))
    floor = max(_largest(seen) for seen in known.values()) * 1e-4
    sites = list(next(iter(known.values())))
    names = _short(sites)
    traces: list[dict[str, Any]] = []
    for recipe, seen in known.items():
        rows = [seen[site]["values"] for site in sites]
        width = max(map(len, rows))
        logs = [[math.log10(max(value, floor)) for value in row] + [None] * (width - len(row)) for row in rows]
        raw = [[f"{value:.3g}" for value in row] + [""] * (width - len(row)) for row in rows]
        traces.append(
            {
                "type": "heatmap",
                "z": logs,
                "x": list(range(1, width + 1)),
                "y": names,
                "customdata": raw,
                "coloraxis": "coloraxis",
                "xgap": 1,
                "ygap": 1,
                "meta": recipe,
                "visible": recipe == first,
                "hovertemplate": "%{y}<br>σ<sub>%{x}</sub> = %{customdata}<extra></extra>",
            }
        )
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": [seen[site]["effective_rank"] for site in sites],
                "y": names,
                "xaxis": "x2",
                "customdata": [[seen[site]["norm"], seen[site]["stable_rank"]] for site in sites],
                "marker": {"color": "#9aa4af"},
                "meta": recipe,
                "visible": recipe == first,
                "hovertemplate": "%{y}<br>effective rank %{x:.2f}<br>norm %{customdata[0]:.3g}<br>"
                "stable rank %{customdata[1]:.2f}<extra></extra>",
            }
        )
    row_height = max(7, min(19, 1600 // len(sites)))
    bar = {
        "title": {"text": "σ", "side": "right"},
        "thickness": 12,
        "len": min(1.0, 240 / (row_height * len(sites))),
        "outlinewidth": 0,
        "tickprefix": "10<sup>",
        "ticksuffix": "</sup>",
        "dtick": 1,
        "tickfont": {"color": SOFT, "size": 12},
    }
    return {
        "choices": [first, *(recipe for recipe in known if recipe != first)],
        "data": traces,
        "layout": layout(
            110 + row_height * len(sites),
            right=84,
            xaxis=axis(title="singular value number", domain=[0, 0.72], showgrid=False),
            xaxis2=axis(title="effective rank", domain=[0.76, 1], anchor="y", rangemode="tozero"),
            yaxis=axis(autorange="reversed", showgrid=False, automargin=True, tickfont={"size": min(12, row_height)}),
            coloraxis={"colorscale": "Cividis", "colorbar": bar},
            bargap=0.25,
        ),
    }


def _largest(seen: Mapping[str, Any]) -> float:
    return max((max(site["values"]) for site in seen.values()), default=0.0) or 1.0


def _short(sites: Sequence[str]) -> list[str]:
    """Names of layers without what all of them begin with."""
    parts = [site.split(".") for site in sites]
    shared = 0
    while len(sites) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return [".".join(part[shared:]) for part in parts]
