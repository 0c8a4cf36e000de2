"""`report.html`: the comparison as one page that opens offline, with its plots, its table and what it does not show.

The page holds its style, plotly's script and the figures as JSON. A content security policy in it forbids every request.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from rankwise.core.checkpoint import write_atomically
from rankwise.lab.captions import FORGETS_NOTE, METHOD, TABLE_NOTE
from rankwise.lab.figures import Palette, figures
from rankwise.lab.result import ComparisonResult, Row
from rankwise.lab.terminal import bytes_text, count_text, interval_text

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"


def write(found: ComparisonResult, path: Path) -> None:
    """Writes the page."""
    write_atomically(path, page(found))


def page(found: ComparisonResult) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    palette = Palette([row.recipe for row in found.rows])
    drawn = figures(found, palette)
    sections = "\n".join(_section(name, figure) for name, figure in drawn.items())
    data = {name: {"data": figure["data"], "layout": figure["layout"]} for name, figure in drawn.items()}
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(_title(found))}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{_asset('report.css')}</style>",
            "</head><body><main>",
            _head(found),
            _findings(found),
            _table(found, palette),
            sections,
            _provenance(found),
            "</main>",
            f"<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="figures">{_json(data)}</script>',
            f"<script>{_asset('report.js')}</script>",
            "</body></html>",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("rankwise.lab").joinpath("assets", name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def _title(found: ComparisonResult) -> str:
    model, data = found.settings.get("task model", "a model"), found.settings.get("task data", "a task")
    return f"Low-rank methods for {model} on {data}"


def _head(found: ComparisonResult) -> str:
    seeds = max((row.finished + row.diverged for row in found.rows), default=0)
    minutes = (found.about.get("seconds") or 0.0) / 60
    facts = [
        f"{len(found.rows)} recipes",
        f"{seeds} seed{'s' if seeds != 1 else ''}",
        f"{found.settings['steps']} steps of {found.settings['batch_size']} rows",
        f"{minutes:.1f} minutes of computing",
    ]
    return (
        f'<header><p class="kicker">rankwise compare</p><h1>{html.escape(_title(found))}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p></header>'
    )


def _findings(found: ComparisonResult) -> str:
    lead, *rest = found.statements
    items = []
    for sentence in rest:
        for mark, kind in (("Resolved: ", "resolved"), ("NOT resolved: ", "unresolved")):
            if sentence.startswith(mark):
                words = sentence.removeprefix(mark)
                items.append(f'<li class="{kind}"><b>{mark[:-2].lower()}</b><span>{html.escape(words)}</span></li>')
                break
        else:
            items.append(f'<li class="remark"><b>note</b><span>{html.escape(sentence)}</span></li>')
    return f'<section class="findings"><p class="lead">{html.escape(lead)}</p><ul>{"".join(items)}</ul></section>'


def _table(found: ComparisonResult, palette: Palette) -> str:
    retained = any(row.retention is not None for row in found.rows)
    heads = ["recipe", found.metric_name, "loss", *(["forgets"] if retained else []), "learning rate", "trained numbers"]
    heads += ["optimizer state", "FLOPs", "saved for backward", "seconds per step", "on disk"]
    cells = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    rows = "".join(_row(row, found, palette, retained, len(heads)) for row in found.ranked())
    note = TABLE_NOTE + (FORGETS_NOTE.format(found.settings.get("task retention", "loss on general text")) if retained else "")
    return (
        '<section><h2>The table</h2><div class="scroll"><table><thead><tr>'
        f'{cells}</tr></thead><tbody>{rows}</tbody></table></div><p class="note">{html.escape(note)}</p></section>'
    )


def _row(row: Row, found: ComparisonResult, palette: Palette, retained: bool, width: int) -> str:
    dot = f'<i style="background:{palette.color(row.recipe)}"></i>'
    name = f"<th>{dot}{html.escape(row.recipe)}</th>"
    if row.metric is None:
        return f'<tr>{name}<td colspan="{width - 1}" class="failed">{html.escape(row.note)}</td></tr>'
    diverged = f' <span class="failed">{row.diverged} diverged</span>' if row.diverged else ""
    cells = [
        interval_text(row.metric) + diverged,
        interval_text(row.loss),
        *([interval_text(row.retention, signed=True)] if retained else []),
        f"{row.learning_rate:.3g}",
        count_text(row.cost["trained"]),
        count_text(row.cost["state"]),
        f"×{row.cost['relative_flops']:.2f}",
        f"×{row.cost['relative_saved_bytes']:.2f}",
        "–" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
        "–" if row.adapter_bytes is None else bytes_text(row.adapter_bytes),
    ]
    best = ' class="best"' if row.recipe == found.winner else ""
    return f"<tr{best}>{name}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _section(name: str, figure: Mapping[str, Any]) -> str:
    choices = "".join(
        f'<button type="button" data-figure="{name}" data-show="{html.escape(choice)}">{html.escape(choice)}</button>'
        for choice in figure.get("choices", ())
    )
    bar = f'<div class="choices">{choices}</div>' if choices else ""
    return (
        f"<section><h2>{html.escape(figure['title'])}</h2><p>{html.escape(figure['text'])}</p>{bar}"
        f'<div class="plot" id="plot-{name}" style="height:{figure["layout"]["height"]}px"></div></section>'
    )


def _provenance(found: ComparisonResult) -> str:
    about = found.about
    rows = {**found.settings, **{key: about[key] for key in ("rankwise", "torch", "python", "machine") if key in about}}
    items = "".join(f"<dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd>" for key, value in rows.items())
    command = about.get("command") or ""
    shown = f"<pre>{html.escape(command)}</pre>" if command else ""
    tuning = ", ".join(f"{row.recipe} {row.sweep_steps}" for row in found.rows)
    return (
        '<section class="provenance"><h2>How this was made</h2>'
        f"<p>{METHOD} Training steps spent on looking for the rate: {html.escape(tuning)}.</p>{shown}<dl>{items}</dl></section>"
    )
