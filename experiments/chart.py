"""Lines or points as a picture: a small SVG in the style of the lab's plots, names beside the lines instead of a legend."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.lab.plots import FONT, GRID, INK, SOFT, Palette, dodged, log_ticks

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 520, 64, 24, 56
LINE = 17  # pixels between two names
SAMPLE = 30  # of a line, beside its name
DASHES = ("", "7 4", "2 4", "9 3 2 3")  # when the colors come again


@dataclass(frozen=True)
class Series:
    """One line, or one point with its name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def chart(series: Sequence[Series], *, x: str, y: str, log_x: bool = False, top: float | None = None, title: str = "") -> str:
    """The picture.

    Args:
        series: lines; those of one point become a dot.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        log_x: whether the horizontal axis is logarithmic.
        top: upper end of the vertical axis, default the largest value; lines above it leave the frame.
        title: for readers that do not see the picture.
    """
    right = 24 + SAMPLE + 7 * max((len(one.name) for one in series), default=0)
    across = [value for one in series for value in one.x]
    up = [value for one in series for value in one.y if top is None or value <= top]
    low_x, high_x = min(across), max(across)
    low_y, high_y = min(up), max(up) if top is None else top
    margin = 0.04 * (high_y - low_y or 1.0)
    low_y, high_y = low_y - margin, high_y + margin
    if log_x:
        low_x, high_x = math.log10(low_x / 1.1), math.log10(high_x * 1.1)

    def place_x(value: float) -> float:
        at = math.log10(value) if log_x else value
        return LEFT + (at - low_x) / ((high_x - low_x) or 1.0) * (WIDTH - LEFT - right)

    def place_y(value: float) -> float:
        return TOP + (high_y - value) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    palette = Palette([one.name for one in series])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="13" '
        f"font-family='{FONT}'><title>{html.escape(title or y)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
    ]
    for value in ticks(low_y, high_y):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - right}" y1="{place_y(value):.1f}" y2="{place_y(value):.1f}" stroke="{GRID}"/>'
        )
        parts.append(_text(LEFT - 8, place_y(value) + 4, f"{value:g}", "end"))
    marks = log_ticks(low_x, high_x) if log_x else {}
    places = marks.get("tickvals") or ticks(low_x, high_x)
    names = marks.get("ticktext") or [f"{value:,.0f}" for value in places]
    for value, name in zip(places, names, strict=True):
        if LEFT <= place_x(value) <= WIDTH - right:
            parts.append(_text(place_x(value), HEIGHT - BOTTOM + 20, name, "middle"))
    parts.append(_text((LEFT + WIDTH - right) / 2, HEIGHT - 12, x, "middle"))
    parts.append(_text(16, TOP - 8, y, "start"))
    heights = dodged([place_y(min(one.y[-1], high_y)) for one in series], LINE)
    lowest = HEIGHT - BOTTOM - LINE / 2
    for index in sorted(range(len(heights)), key=lambda index: -heights[index]):  # names stay above the axis
        heights[index] = min(heights[index], lowest)
        lowest = heights[index] - LINE
    for index, (one, height) in enumerate(zip(series, heights, strict=True)):
        color, end = palette.color(one.name), place_x(one.x[-1])
        if len(one.x) == 1:
            parts.append(f'<circle cx="{end:.1f}" cy="{place_y(one.y[0]):.1f}" r="6" fill="{color}"/>')
        else:
            points = " ".join(f"{place_x(at):.1f},{place_y(value):.1f}" for at, value in zip(one.x, one.y, strict=True))
            dash = DASHES[index // 8 % len(DASHES)]
            stroke = f'stroke="{color}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")
            parts.append(f'<polyline points="{points}" fill="none" {stroke} clip-path="url(#frame)"/>')
            parts.append(f'<path d="M{end + 8:.1f} {height:.1f}h{SAMPLE - 4}" {stroke}/>')
        parts.append(_text(end + (12 if len(one.x) == 1 else SAMPLE + 12), height + 4, one.name, "start", color))
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - right}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="{INK}"/></svg>\n'
    )
    return "\n".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Round values from low to high, about six."""
    step = 10 ** math.floor(math.log10((high - low or 1.0) / 5))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (factor * step) <= 7), 10)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str, color: str = SOFT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}">{html.escape(text)}</text>'
