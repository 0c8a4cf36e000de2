"""What the report's plots share: colors, axes, layout, and names at the ends of lines that do not run into each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

INK, SOFT, GRID = "#1b1f24", "#57606a", "#e7ebef"
FONT = '"Inter", "Segoe UI", "Helvetica Neue", Arial, "Liberation Sans", sans-serif'
COLUMN = 0.19  # width of one of four panels
_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C6D1F")


class Palette:
    """A color per recipe, the same in every plot; after eight recipes colors come again and the names tell them apart."""

    def __init__(self, recipes: Sequence[str]) -> None:
        self._colors = {recipe: _OKABE_ITO[index % len(_OKABE_ITO)] for index, recipe in enumerate(recipes)}

    def color(self, recipe: str) -> str:
        """The color."""
        return self._colors[recipe]

    def pale(self, recipe: str) -> str:
        """The color for a band."""
        color = self._colors[recipe]
        red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.14)"


def axis(**settings: Any) -> dict[str, Any]:
    """An axis in the page's style."""
    title = settings.pop("title", None)
    plain: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "ticks": "", "tickfont": {"size": 13}}
    if title is not None:
        plain["title"] = {"text": title, "font": {"size": 13, "color": SOFT}, "standoff": 12}
    return {**plain, **settings}


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """Ticks of a log axis from 10**low to 10**high, written out; 1, 2 and 5 of each decade where there are few decades."""
    leading = (1, 2, 5) if high - low < 2.2 else (1,)
    values = [lead * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for lead in leading]
    return {"tickvals": values, "ticktext": [_tick(value) for value in values]}


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def layout(height: int, *, right: int = 24, top: int = 24, bottom: int = 56, **settings: Any) -> dict[str, Any]:
    """A layout in the page's style."""
    return {
        "height": height,
        "margin": {"l": 64, "r": right, "t": top, "b": bottom},
        "font": {"family": FONT, "size": 14, "color": INK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": GRID, "font": {"family": FONT, "size": 13, "color": INK}},
        "showlegend": False,
        **settings,
    }


def points(
    x: Sequence[float], y: Sequence[Any], color: str, *, size: float, opacity: float = 1.0, symbol: str = "circle"
) -> dict[str, Any]:
    """Points without a name in the legend."""
    marker = {
        "color": color,
        "size": size,
        "opacity": opacity,
        "symbol": symbol,
        "line": {"width": 2 if symbol != "circle" else 0},
    }
    return {"type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "marker": marker, "showlegend": False}


def broken(recipe: str) -> str:
    """A recipe's name, on two lines where it is long."""
    if len(recipe) <= 18 or " + " not in recipe:
        return recipe
    terms = recipe.split(" + ")
    half = (len(terms) + 1) // 2
    return " + ".join(terms[:half]) + "<br>+ " + " + ".join(terms[half:])


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the beginning."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(values) + 1)]


def dodged(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved apart to at least `gap`, in the same order, and no further than needed at either side."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    if order:
        shift = sum(placed[index] - heights[index] for index in order) / len(order)
        placed = [height - shift for height in placed]
    return placed


def end_labels(
    ends: Sequence[tuple[str, float, float, str]], low: float, high: float, pixels: int
) -> tuple[int, list[dict[str, Any]]]:
    """Names at the right ends of lines.

    Args:
        ends: name, x and y of the end (logarithms on a log axis), color.
        low: bottom of the vertical axis.
        high: top of it.
        pixels: height of the frame.

    Returns:
        The right margin they need, and annotations.
    """
    names = [broken(name) for name, *_ in ends]
    lines = max((name.count("<br>") + 1 for name in names), default=1)
    gap = (18 * lines + 2) / pixels * (high - low or 1.0)
    heights = dodged([y for _, _, y, _ in ends], gap)
    longest = max((len(part) for name in names for part in name.split("<br>")), default=0)
    notes = [
        {"x": x, "y": height, "text": name, "xanchor": "left", "xshift": 12, "showarrow": False, "align": "left"}
        | {"font": {"color": color, "size": 13}}
        for name, (_, x, _, color), height in zip(names, ends, heights, strict=True)
    ]
    return 28 + 7 * longest, notes
