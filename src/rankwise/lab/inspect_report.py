"""An inspection in the terminal and as a page with heat maps: blocks from top to bottom, kinds of layers side by side."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankwise.core.checkpoint import write_atomically
from rankwise.lab.inspect import Inspection, Layer
from rankwise.lab.page import document, section
from rankwise.lab.plots import axis, layout

SCALE = [[0.0, "#f3f6f9"], [0.25, "#b9d3e6"], [0.5, "#6ba3cb"], [0.75, "#2d6fa3"], [1.0, "#0b3c61"]]  # one hue: more is darker
Measure = tuple[str, Callable[[Layer], float | None], str]
MEASURES: tuple[Measure, ...] = (
    ("norm of the update", lambda layer: layer.norm, ".3g"),
    ("norm relative to the weight", lambda layer: layer.relative_norm, ".2%"),
    ("effective rank", lambda layer: layer.effective_rank, ".2f"),
    ("stable rank", lambda layer: layer.stable_rank, ".2f"),
    ("imbalance of the factors", lambda layer: layer.imbalance, ".3f"),
    ("intruder dimensions", lambda layer: layer.intruders, ".0f"),
)


def show(found: Inspection, console: Console | None = None) -> None:
    """Prints the table; columns that the terminal is too narrow for are left out by name."""
    console = console or Console()
    layers = found.layers
    columns = {
        "layer": [layer.site for layer in layers],
        "m × n": [f"{layer.m} × {layer.n}" for layer in layers],
        "rank": [str(layer.rank) for layer in layers],
        "norm": [f"{layer.norm:.3g}" for layer in layers],
        "of weight": [_cell(layer.relative_norm, ".2%") for layer in layers],
        "effective": [f"{layer.effective_rank:.2f}" for layer in layers],
        "stable": [f"{layer.stable_rank:.2f}" for layer in layers],
        "imbalance": [_cell(layer.imbalance, ".3f") for layer in layers],
        "intruders": [_cell(layer.intruders, "d") for layer in layers],
        **{f"lost at {cut}": [_cell(layer.lost.get(cut), ".1%") for layer in layers] for cut in found.cuts},
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    widths = {head: 2 + max(map(len, [head, *cells])) for head, cells in columns.items()}
    expendable = ["m × n", "imbalance", "effective", *(f"lost at {cut}" for cut in found.cuts[::-1]), "stable", "of weight"]
    narrow = []
    for head in expendable:
        if sum(widths.values()) + 2 > console.width and widths.pop(head, None):
            narrow.append(head)
    table = Table(box=SIMPLE_HEAD, title=escape(found.adapter) + (f" on {escape(found.base)}" if found.base else ""))
    for head in widths:
        table.add_column(head, justify="left" if head == "layer" else "right", no_wrap=head != "layer", overflow="fold")
    for cells in zip(*(columns[head] for head in widths), strict=True):
        table.add_row(*cells)
    console.print(table)
    if found.cuts:
        told = ", ".join(f"{found.lost(cut):.1%} at rank {cut}" for cut in found.cuts)
        console.print(f"Cut to a smaller rank, the whole adapter would lose of its energy: {told}.")
    if narrow:
        console.print(f"Left out, since the terminal is narrow: {', '.join(narrow)}. The page has them.")
    for note in found.notes:
        console.print(escape(note))


def write(found: Inspection, path: Path) -> None:
    """Writes the page."""
    write_atomically(path, page(found))


def page(found: Inspection) -> str:
    """The page as text."""
    figures = {"layers": _layers(found)}
    if found.cuts:
        figures["cuts"] = _cuts(found)
    title = f"Inside {Path(found.adapter).name or found.adapter}"
    facts = [f"{len(found.layers)} layers", f"base {found.base}" if found.base else "read without its base"]
    head = (
        f'<header><p class="kicker">rankwise inspect</p><h1>{html.escape(title)}</h1>'
        f'<p class="facts">{html.escape(" · ".join(facts))}</p></header>'
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in found.notes)
    return document(title, [head, *(section(name, figure) for name, figure in figures.items()), notes], figures)


def _layers(found: Inspection) -> dict[str, Any]:
    """One heat map per measure, shown one at a time."""
    places = {layer.site: found.place(layer.site) for layer in found.layers}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    numbers = {place: layer for layer, place in zip(found.layers, places.values(), strict=True)}
    shown = [measure for measure in MEASURES if any(measure[1](layer) is not None for layer in found.layers)]
    traces = []
    for index, (name, value, form) in enumerate(shown):
        rows = [[value(numbers[block, kind]) if (block, kind) in numbers else None for kind in kinds] for block in blocks]
        traces.append(_heat(name, kinds, [f"block {block}" if block else "" for block in blocks], rows, form, index == 0))
    height = 170 + 26 * max(4, len(blocks))
    bottom = 20 + 6 * max(len(kind) for kind in kinds)
    return {
        "title": "Layer by layer",
        "text": "Darker is more. Blocks from the input at the top to the output at the bottom.",
        "choices": [name for name, _, _ in shown],
        "data": traces,
        "layout": layout(
            height + bottom, bottom=bottom, xaxis=axis(tickangle=-45, automargin=True, showgrid=False),
            yaxis=axis(autorange="reversed", automargin=True, showgrid=False, type="category"),
        ),
    }  # fmt: skip


def _cuts(found: Inspection) -> dict[str, Any]:
    """Layers against ranks: what cutting would lose."""
    rows: list[list[float | None]] = [[layer.lost.get(cut, 0.0) for cut in found.cuts] for layer in found.layers]
    trace = _heat("lost", [f"rank {cut}" for cut in found.cuts], [layer.site for layer in found.layers], rows, ".1%", True)
    return {
        "title": "What a smaller rank would lose",
        "text": "Share of a layer's energy (squared singular values) lost when its update is cut to the rank of the column.",
        "data": [{**trace, "zmin": 0.0, "zmax": 1.0}],
        "layout": layout(
            120 + 17 * len(found.layers), xaxis=axis(showgrid=False, side="top"), top=48,
            yaxis=axis(autorange="reversed", automargin=True, showgrid=False, type="category", tickfont={"size": 11}),
        ),
    }  # fmt: skip


def _heat(name: str, x: list[str], y: list[str], rows: list[list[float | None]], form: str, visible: bool) -> dict[str, Any]:
    return {
        "type": "heatmap", "x": x, "y": y, "z": rows, "meta": name, "visible": visible, "colorscale": SCALE,
        "xgap": 2, "ygap": 2,
        "hovertemplate": f"%{{y}}<br>%{{x}}<br>%{{z:{form}}}<extra></extra>", "hoverongaps": False,
        "colorbar": {"thickness": 12, "outlinewidth": 0, "tickformat": form},
    }  # fmt: skip


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
