"""The comparison in the terminal: a progress bar while it runs, a table and plain sentences at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from rankwise.lab.intervals import Interval
from rankwise.lab.result import ComparisonResult, Row


def quiet_libraries() -> None:
    """Keeps what installed libraries say about extensions that they could not load off the terminal; nothing here uses them."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Progress:
    """One bar over all training steps.

    Args:
        total: steps expected; a widened sweep adds to it.
        quiet: show nothing.
    """

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._total, self._done = total, 0
        self._task = self._bar.add_task("starting", total=max(total, 1), loss="")

    def phase(self, what: str) -> None:
        """Says what is being done."""
        self._bar.update(self._task, description=escape(what), loss="")

    def step(self, number: int, loss: float) -> None:
        """Counts a training step."""
        self._done += 1
        self._total = max(self._total, self._done)
        self._bar.update(self._task, completed=self._done, total=self._total, loss=f"loss {loss:.3f}")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def show(found: ComparisonResult, console: Console | None = None) -> None:
    """Prints the table, the sentences and where things are."""
    console = console or Console()
    for part in tables(found, console.width):
        console.print(part)
    for sentence in found.statements:
        color = "green" if sentence.startswith("Resolved") else "yellow" if sentence.startswith("NOT") else "default"
        console.print(f"[{color}]•[/] {escape(sentence)}")
    console.print(f"\nadapters: {found.out / 'adapters'}\nreport:   {found.report}", soft_wrap=True)


def tables(found: ComparisonResult, width: int) -> list[Table]:
    """The table, best mean first; its costs become a table of their own where the terminal is narrow."""
    retained = any(row.retention is not None for row in found.rows)
    quality = [found.metric_name, "loss", *(["forgets"] if retained else []), "rate"]
    costs = ["trained", "FLOPs", "saved", "s/step", "on disk"]
    title = f"{_task(found)}: means over seeds with 95 % intervals"
    if width >= 62 + 15 * len(quality):
        return [_table(found, title, [*quality, *costs], lambda row: [*_quality(row, retained), *_costs(row)])]
    return [
        _table(found, title, quality, lambda row: _quality(row, retained)),
        _table(found, "costs: numbers, multiples of the frozen base, seconds, bytes", costs, _costs),
    ]


def _table(found: ComparisonResult, title: str, columns: list[str], cells: Callable[[Row], list[str]]) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("recipe", overflow="fold", min_width=12)
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in found.ranked():
        filled = cells(row) if row.metric is not None else [f"[red]{escape(row.note)}[/]", *[""] * (len(columns) - 1)]
        shown.add_row(escape(row.recipe), *filled, style="bold" if row.recipe == found.winner else "")
    return shown


def _task(found: ComparisonResult) -> str:
    named = [str(found.settings[key]) for key in ("task model", "task data") if key in found.settings]
    return " on ".join(named) or "comparison"


def _quality(row: Row, retained: bool) -> list[str]:
    return [
        interval_text(row.metric) + (f" [red]({row.diverged} diverged)[/]" if row.diverged else ""),
        interval_text(row.loss),
        *([interval_text(row.retention, signed=True)] if retained else []),
        f"{row.learning_rate:.2g}",
    ]


def _costs(row: Row) -> list[str]:
    return [
        count_text(row.cost["trained"]),
        f"×{row.cost['relative_flops']:.2f}",
        f"×{row.cost['relative_saved_bytes']:.2f}",
        "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
        "" if row.adapter_bytes is None else bytes_text(row.adapter_bytes),
    ]


def interval_text(interval: Interval | None, *, signed: bool = False) -> str:
    """Mean ± half width."""
    if interval is None:
        return "–"
    mean = f"{interval.mean:+.3f}" if signed else f"{interval.mean:.3f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.3f}"


def count_text(count: float) -> str:
    """A number of numbers, short."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.0f}"


def bytes_text(count: float) -> str:
    """A size on disk, short."""
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:.0f} B"
