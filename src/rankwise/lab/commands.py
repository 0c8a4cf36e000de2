"""What the commands of the command line do, between typer's arguments and the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import rankwise
from rankwise.core.catalog import SHELVES
from rankwise.core.checkpoint import JSON_NAME, read
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Dense, Operator
from rankwise.core.queries import as_low_rank

console = Console(highlight=False)
_TASK_FIELDS = ("evaluation", "task", "columns", "train_limit", "eval_limit", "max_length", "image_size", "seed")


def columns_of(texts: Sequence[str] | None) -> dict[str, str] | None:
    """`--column text=review` as {"text": "review"}."""
    return None if texts is None else _pairs(texts)


def task_of(model: str | None, data: str | None, settings: Mapping[str, Any]) -> Any:
    """The task that the arguments describe."""
    from rankwise.lab.tasks import make_task

    if model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise ArgumentError(f"{missing} is missing; for instance: --model packaged:minilm --data packaged:tweets")
    given = {key: settings[key] for key in _TASK_FIELDS if settings.get(key) is not None}
    return make_task(model, data, **given)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for text, (part, sign, column) in zip(texts, pairs, strict=True):
        if not (part and sign and column):
            raise ArgumentError(f"--column {text!r} is not of the form part=column, such as text=review")
    return {part: column for part, _, column in pairs}


def train(task: Any, recipe: str, out: Path, **options: Any) -> None:
    """Trains one recipe, prints what came out and where the adapter is."""
    from rankwise.lab.train import train_run

    for key, value in train_run(task, recipe, out=out, **options).items():
        console.print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}", markup=False)
    console.print(f"adapter: {out}")


def inspect(adapter: Path, base: str | None, html: Path | None) -> None:
    """Prints the table and writes the heat map."""
    from rankwise.lab.inspect import run_inspect

    run_inspect(adapter, base=base, out=html or adapter / "inspect.html")


def load_base(model: str | None, folder: Path) -> nn.Module:
    """The base model for an adapter folder, with a head of the size that was trained beside the adapter, if one was."""
    from rankwise.lab.models import load_model

    if model is None:
        raise ArgumentError("--model is missing: the base that the adapter was trained on, such as packaged:minilm")
    kind, labels = "causal-lm", None
    if (folder / JSON_NAME).is_file():
        description, tensors = read(folder)
        heads = [tensors[name] for name in description["auxiliary"] if name in tensors]
        if heads:
            images = any("patch_embeddings" in site or "vit" in site or "dinov2" in site for site in description["sites"])
            kind = "image-classification" if images else "text-classification"
            labels = [str(index) for index in range(heads[-1].shape[0])]
    return load_model(model, kind, labels).model


def updates_of(folder: Path, model: nn.Module) -> dict[str, Operator]:
    """The updates (site -> update) of an adapter folder, rankwise's or PEFT's, on its base; the model is left as it was."""
    if (folder / JSON_NAME).is_file():
        handle = rankwise.load_(model, folder, name="reading", trainable=False)
    else:
        handle = rankwise.interop.from_peft(model, folder, name="reading", trainable=False)
    updates = {}
    for site, operator in handle.updates().items():
        factors = as_low_rank(operator)
        updates[site] = Dense(operator.dense().detach()) if factors is None else _detached(factors)
    handle.detach_()
    return updates


def _detached(factors: rankwise.LowRank) -> rankwise.LowRank:
    return rankwise.LowRank(factors.B.detach().clone(), factors.A.detach().clone(), factors.scale)


def merge(
    adapters: Sequence[Path],
    model: str | None,
    out: Path,
    *,
    method: str,
    weights: str | None,
    rank: int | None,
    data: Sequence[str],
    samples: int,
) -> None:
    """Merges adapter folders and saves the result as one adapter."""
    from rankwise import merging

    if len(adapters) < 2:
        raise ArgumentError(f"merge needs two or more adapters, got {len(adapters)}")
    given = None if weights is None else [float(part) for part in weights.split(",")]
    if given is not None and len(given) != len(adapters):
        raise ArgumentError(f"--weights has {len(given)} numbers for {len(adapters)} adapters")
    base = load_base(model, adapters[0])
    updates = [updates_of(folder, base) for folder in adapters]
    if method == "iteris":
        if len(data) != len(adapters):
            raise ArgumentError(
                f"iteris reads inputs of every task: pass --data once per adapter ({len(adapters)}), got {len(data)}"
            )
        batches = [_inputs(str(model), name, samples) for name in data]
        result = merging.iteris(base, updates, batches, given, rank=rank)
    else:
        result = merging.merge_adapters(updates, method, weights=given, rank=rank)
    console.print(escape(str(result)))
    handle = merging.as_adapter(base, result, name="merge")
    handle.save(out)
    console.print(
        f"merged adapter: {out}  ({handle.trained_numbers:,} numbers). Heads trained beside the adapters are not merged."
    )


def _inputs(model: str, data: str, samples: int) -> list[Any]:
    from rankwise.lab.tasks import make_task

    task = make_task(model, data, retention="none")
    return [
        {key: value for key, value in batch.items() if key != "labels"} for batch in task.probe_batches(max(1, samples // 8))
    ]


def export(adapter: Path, model: str | None, to: str, out: Path, **options: Any) -> None:
    """Writes an adapter in another tool's format."""
    if to != "peft":
        raise ArgumentError(f"--to {to!r} is not known; there is: peft (also read by vLLM and llama.cpp)")
    base = load_base(model, adapter)
    folder = rankwise.interop.to_peft(rankwise.load_(base, adapter, trainable=False), out, **options)
    console.print(f"PEFT adapter: {folder}")


def methods(name: str | None) -> None:
    """Prints the catalog, or one entry of it."""
    if name is not None:
        entry = rankwise.catalog.entry(name)
        console.print(f"[bold]{escape(entry.title)}[/bold]  ({entry.slug}, {entry.shelf})\n{escape(entry.summary)}\n")
        for label, value in (
            ("formula", entry.formula),
            ("trained numbers per layer", entry.trained),
            ("cost", entry.cost),
            ("merge", entry.merges),
            ("LoRA export", entry.exports),
            ("when", entry.when),
            ("reference", str(entry.reference)),
        ):
            if value:
                console.print(f"  [bold]{label}[/bold]  {escape(value)}")
        return
    for shelf in SHELVES:
        table = Table("name", "formula", "trained", "what it does", title=shelf, title_justify="left", box=None, pad_edge=False)
        for slug in rankwise.catalog.names(shelf):
            entry = rankwise.catalog.entry(slug)
            table.add_row(slug, escape(entry.formula), escape(entry.trained), escape(entry.summary))
        if table.row_count:
            console.print(table, "")
    console.print("rankwise methods NAME tells more of one.")
