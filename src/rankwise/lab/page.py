"""The shell of the lab's pages: one self-contained HTML file with plots that opens offline.

The page holds its style, plotly's script and the figures as JSON. A content security policy in it forbids every request.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
Figure = Mapping[str, Any]  # data and layout for plotly, title, text, and choices: the `meta` of traces shown one at a time


def document(title: str, body: Sequence[str], figures: Mapping[str, Figure]) -> str:
    """A page.

    Args:
        title: of the window.
        body: pieces of HTML; `section` makes the one of a figure.
        figures: name -> figure.
    """
    from plotly.offline import get_plotlyjs

    data = {name: {"data": figure["data"], "layout": figure["layout"]} for name, figure in figures.items()}
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{_asset('report.css')}</style>",
            "</head><body><main>",
            *body,
            "</main>",
            f"<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="figures">{_json(data)}</script>',
            f"<script>{_asset('report.js')}</script>",
            "</body></html>",
        ]
    )


def section(name: str, figure: Figure) -> str:
    """The place of a figure, with its title, text and buttons."""
    choices = "".join(
        f'<button type="button" data-figure="{name}" data-show="{html.escape(choice)}">{html.escape(choice)}</button>'
        for choice in figure.get("choices", ())
    )
    bar = f'<div class="choices">{choices}</div>' if choices else ""
    return (
        f"<section><h2>{html.escape(figure['title'])}</h2><p>{html.escape(figure['text'])}</p>{bar}"
        f'<div class="plot" id="plot-{name}" style="height:{figure["layout"]["height"]}px"></div></section>'
    )


def _asset(name: str) -> str:
    return resources.files("rankwise.lab").joinpath("assets", name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
