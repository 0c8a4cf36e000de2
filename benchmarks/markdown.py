"""Tables as Markdown, and a line on the machine: what every generated page needs."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns of even width."""
    cells = [list(head), *([str(cell) for cell in line] for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def machine(*packages: str) -> str:
    """The machine and the versions, as two sentences."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages or ("torch", "transformers"))
    return (
        f"{platform.system()} on {os.cpu_count()} shared cores ({platform.machine()}), one thread, no GPU; "
        f"Python {platform.python_version()}, {versions}."
    )
