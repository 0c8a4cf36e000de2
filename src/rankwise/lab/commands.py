"""What the commands train, inspect, merge, export and methods do, between typer's arguments and the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from rankwise import catalog
from rankwise.core.catalog import SHELVES
from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.handle import Handle
from rankwise.lab import runs
from rankwise.lab.open import base_of, check_adapter, put_on

TASK_OPTIONS = ("evaluation", "task", "columns", "train_limit", "eval_limit", "max_length", "image_size", "retention", "device")


def train(model: str, data: str, recipe: str, out: Path, given: Mapping[str, Any], **options: Any) -> None:
    """Trains one recipe, and says what came out and where the adapter is."""
    from rankwise.lab.tasks import make_task
    from rankwise.lab.train import train_run

    console = Console(highlight=False)
    task = make_task(model, data, **{name: given[name] for name in TASK_OPTIONS if given.get(name) is not None})
    was_finished = runs.finished(out) is not None
    result = train_run(task, recipe, out=out, **options)
    if was_finished:
        console.print(f"{escape(str(out))} holds this run, finished before; nothing was trained again.")
    console.print(escape(result["coverage"]))
    for name, value in result["metrics"].items():
        console.print(f"  {name:<12} {value:.4f}")
    if result["retention"] is not None:
        console.print(
            f"  {'retention':<12} {result['retention']:.4f}  ({escape(result['retention_measures'])}; lower is better)"
        )
    console.print(f"adapter: {escape(str(out / runs.ADAPTER))}  ({result['seconds']:.0f} s)", soft_wrap=True)


def columns_of(texts: Sequence[str] | None) -> dict[str, str] | None:
    """`--column part=column`, read."""
    if not texts:
        return None
    pairs = [text.partition("=") for text in texts]
    for text, (part, sign, column) in zip(texts, pairs, strict=True):
        if not (part and sign and column):
            raise ArgumentError(f"--column {text!r} is not of the form part=column, such as text=review")
    return {part: column for part, _, column in pairs}


def inspect(adapter: Path, base: str | None, html: Path | None, task: str | None) -> None:
    """Prints the table, and writes the page."""
    from rankwise.lab import inspect_report
    from rankwise.lab.inspect import inspect_adapter

    found = inspect_adapter(adapter, base, task=task)
    inspect_report.show(found)
    path = html or adapter / "inspect.html"
    inspect_report.write(found, path)
    Console(highlight=False).print(f"heat maps: {escape(str(path))}", soft_wrap=True)


def merge(
    adapters: Sequence[Path],
    base: str | None,
    out: Path,
    *,
    method: str,
    weights: str | None,
    rank: int | None,
    data: Sequence[str],
    samples: int,
    head: int | None,
    task: str | None,
) -> None:
    """Merges adapter folders and saves the result as one adapter."""
    from rankwise import merging

    if len(adapters) < 2:
        raise ArgumentError(f"merge needs two or more adapters, got {len(adapters)}")
    folders = [runs.adapter_folder(folder) for folder in adapters]
    for folder in folders:
        check_adapter(folder)
    values = _weights(weights, len(folders))
    if (method == "iteris") != bool(data) or (data and len(data) != len(folders)):
        raise ArgumentError(
            f"--method iteris reads inputs of every adapter's task: pass --data {len(folders)} times with it, and with no "
            f"other method; got --method {method} and {len(data)} --data"
        )
    model, origin = base_of(folders, base, task)
    handles: list[Handle] = []
    heads: list[dict[str, Tensor]] = []
    for index, folder in enumerate(folders):
        handles.append(put_on(model, folder, name=f"part{index}"))
        named = dict(model.named_parameters())
        heads.append({name: named[name].detach().clone() for name in handles[-1].auxiliary})
    kept = _head(heads, folders, head)
    updates = [handle.updates() for handle in handles]
    if method == "iteris":
        batches = [_inputs(origin.model, name, samples) for name in data]
        result = merging.iteris(model, updates, batches, values, rank=rank)
    else:
        result = merging.merge_adapters(updates, method, weights=values, rank=rank)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in kept.items():
            named[name].copy_(tensor)
    handle = merging.as_adapter(model, result, name="merge", train_also=sorted({name.rpartition(".")[0] for name in kept}))
    made = {"merged": [str(folder) for folder in folders], "method": method, "weights": values, "rank": rank, "head": head}
    runs.claim(out, {"model": origin.model, "kind": origin.kind, "labels": list(origin.labels), **made, "data": list(data)})
    handle.save(out / runs.ADAPTER)
    console = Console(highlight=False)
    console.print(escape(str(result)))
    console.print(f"adapter: {escape(str(out / runs.ADAPTER))}  ({handle.trained_numbers:,} numbers)", soft_wrap=True)


def _weights(text: str | None, count: int) -> list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--weights are numbers joined by commas, such as 0.5,0.5; got {text!r}") from error
    if len(values) != count:
        raise ArgumentError(f"--weights has {len(values)} numbers for {count} adapters")
    return values


def _head(heads: Sequence[dict[str, Tensor]], folders: Sequence[Path], chosen: int | None) -> dict[str, Tensor]:
    """The tensors trained whole beside the adapters: an update can be merged, a classifier has to be chosen."""
    if chosen is not None:
        if not 1 <= chosen <= len(heads):
            raise ArgumentError(f"--head is the number of an adapter, 1 to {len(heads)}, not {chosen}")
        return heads[chosen - 1]
    first = heads[0]
    alike = all(set(one) == set(first) and all(torch.equal(one[name], first[name]) for name in first) for one in heads)
    if alike:
        return first
    names = sorted({name for one in heads for name in one})
    choices = ", ".join(f"{index} for {folder}" for index, folder in enumerate(folders, start=1))
    raise MergeError(
        f"{', '.join(names)} were trained whole beside the adapters and differ; updates can be merged, heads have to be "
        f"chosen: pass --head ({choices})"
    )


def _inputs(model: str, data: str, samples: int) -> list[Any]:
    """Batches of a task without labels."""
    from rankwise.lab.tasks import make_task

    batches = make_task(model, data, retention="none", device="cpu").probe_batches(max(1, samples // 8))
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def export(adapter: Path, base: str | None, to: str, out: Path, *, task: str | None, **options: Any) -> None:
    """Writes an adapter in another library's format."""
    from rankwise.interop import to_peft

    if to != "peft":
        raise ArgumentError(f"--to {to!r} is not known; there is: peft (vLLM and llama.cpp read its format too)")
    folder = runs.adapter_folder(adapter)
    check_adapter(folder)
    model, _ = base_of([folder], base, task)
    written = to_peft(put_on(model, folder), out, **options)
    Console(highlight=False).print(f"PEFT adapter: {escape(str(written))}", soft_wrap=True)


def methods(name: str | None) -> None:
    """Prints the catalog, or one entry of it."""
    console = Console(highlight=False)
    if name is not None:
        entry = catalog.entry(name)
        console.print(f"[bold]{escape(entry.title)}[/bold]  ({entry.slug}, {entry.shelf})\n{escape(entry.summary)}\n")
        facts = {
            "formula": entry.formula, "trained per layer": entry.trained, "cost": entry.cost, "merge": entry.merges,
            "LoRA export": entry.exports, "when": entry.when, "reference": str(entry.reference),
        }  # fmt: skip
        grid = Table.grid(padding=(0, 2))
        for label, value in facts.items():
            if value:
                grid.add_row(f"[bold]{label}[/bold]", escape(value))
        console.print(grid)
        return
    for shelf in SHELVES:
        table = Table("name", "formula", "trained", "what it does", title=shelf, title_justify="left", box=None, pad_edge=False)
        for slug in catalog.names(shelf):
            entry = catalog.entry(slug)
            table.add_row(slug, escape(entry.formula), escape(entry.trained), escape(entry.summary))
        if table.row_count:
            console.print(table, "")
    console.print("rankwise methods NAME tells more of one.")
