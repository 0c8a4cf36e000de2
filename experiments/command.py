"""The command line that the experiments share."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from experiments.running import Method, chosen
from rankwise.core.checkpoint import write_atomically
from rankwise.core.errors import RankwiseError
from rankwise.lab.terminal import quiet_libraries


class Table(Protocol):
    """A finished table."""

    def text(self) -> str:
        """For the terminal."""
        ...

    def page(self, command: str, picture: str) -> str:
        """As Markdown."""
        ...

    def picture(self) -> str:
        """As SVG."""
        ...


Make = Callable[[argparse.Namespace, list[Method], list[str]], Table]  # (options, methods, those the catalog lacks) -> table


def run(
    name: str,
    text: str | None,
    methods: Sequence[Method],
    defaults: Any,
    make: Make,
    arguments: Sequence[str] | None,
    *,
    seeds: int | None = None,
) -> int:
    """Reads the command line, makes the table, prints it and writes its page.

    Args:
        name: the module's name.
        text: what it does, for --help.
        methods: rows to choose from.
        defaults: a size with `data` and `steps`.
        make: makes the table.
        arguments: of the command line; None: the process's.
        seeds: runs of each method; None where the table has one run a row.
    """
    command = f"python -m {name}"
    out = Path("runs") / name.rpartition(".")[2]
    parser = argparse.ArgumentParser(prog=command, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="PAGE", type=Path, help="also write the page, and its figure beside it as .svg")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table, by name; default: all")
    parser.add_argument("--steps", type=int, default=defaults.steps, help=f"optimizer steps (default {defaults.steps})")
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds, help=f"runs of each method (default {seeds})")
    parser.add_argument("--data", default=defaults.data, help=f"what to train on (default {defaults.data})")
    parser.add_argument("--rate", type=float, help="highest rate of the adapted layers, instead of each method's own")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of finished rows (default {out})")
    parser.add_argument("--fresh", action="store_true", help="run again what is there already")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    quiet_libraries()
    try:
        found, missing = chosen(methods, options.methods)
        if missing:
            print(f"not in this version's catalog: {', '.join(missing)}", file=sys.stderr)
        if options.rate is not None:
            found = [replace(method, rate=options.rate) for method in found]
        table = make(options, found, missing)
    except RankwiseError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; finished rows are in {options.out}, the same command goes on from there", file=sys.stderr)
        return 130
    print(table.text())
    if options.write:
        picture = options.write.with_suffix(".svg")
        options.write.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(picture, table.picture())
        write_atomically(options.write, table.page(shlex.join([*command.split(), *given]), picture.name))
    return 0
