"""The results as text: the same tables in the terminal and in docs/results/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.adapters import ADAPTERS
from benchmarks.clock import Ratio
from benchmarks.markdown import machine, table
from benchmarks.model import HIDDEN, INTERMEDIATE, LAYERS, RANK, TOKENS, VOCABULARY
from benchmarks.training import Row

Goal = tuple[str, float, float, str]  # what, measured, at most, unit


def _training(rows: Sequence[Row], *, timed: bool = True) -> str:
    head = ["trained", "library", "numbers", "FLOPs", "kept MiB", *(("time", "least", "wall") if timed else ())]
    lines = []
    for row in rows:
        times = [f"{row.cpu:.2f}", f"{row.best:.2f}", f"{row.wall:.2f}"] if timed else []
        lines.append([row.name, row.library, f"{row.trained:,}", f"{row.flops:.3f}", f"{row.saved:.1f}", *times])
    return table(head, lines)


def _over(rows: Sequence[Row]) -> str:
    """The rows of the catalog that miss their target."""
    missed = [f"{row.name} takes {row.cpu:.2f}" for row in rows if row.target is not None and round(row.cpu, 2) > row.target]
    return ", ".join(missed) if missed else "none does"


def goals(main: Sequence[Row], half: Sequence[Row], times: Mapping[str, float], mixed: Mapping[str, Ratio]) -> list[Goal]:
    """The targets of the design, and what was measured."""
    found: list[Goal] = [
        (f"{row.name}: time of a step", row.cpu, row.target, "× base") for row in main if row.target is not None
    ]
    found.append(("LoRA on bfloat16: kept for backward", next(r.saved for r in half if r.library == "rankwise"), 44.0, "MiB"))
    found.append((f"load {ADAPTERS} adapters", times[f"rankwise: load {ADAPTERS}"] / 1e3, 1.0, "s"))
    found.append((f"switch, {ADAPTERS} loaded", times[f"rankwise: switch, {ADAPTERS} loaded"], 1.0, "ms"))
    found.append(("8 adapters in one batch", mixed["rankwise, 8 adapters"].cpu, 1.30, "× base"))
    return found


def page(
    main: Sequence[Row],
    catalog: Sequence[Row],
    half: Sequence[Row],
    times: Mapping[str, float],
    mixed: Mapping[str, Ratio],
    command: str,
) -> str:
    """The whole page."""
    targets = [
        (what, f"{value:.3g} {unit}", f"{bound:.2f} {unit}", "hit" if round(value, 2) <= bound else "missed")
        for what, value, bound, unit in goals(main, half, times, mixed)
    ]
    return f"""# Benchmarks

Made by `{command}`. {machine("torch", "transformers", "peft", "safetensors")}

Model: the Llama shape, hidden {HIDDEN}, {LAYERS} layers, intermediate {INTERMEDIATE}, vocabulary {VOCABULARY}, random weights,
every linear layer but the head adapted, r = {RANK}, one sequence of {TOKENS} tokens, forward and backward.

FLOPs and times are relative to the frozen base (gradients of inputs only) of the same run. FLOPs, numbers and what autograd
keeps for backward (MiB, parameters left out) are exact. *time* is the median over rounds of the ratio of CPU times to the base
of the same round, all variants taking turns; *least* is the ratio of the smallest CPU times, *wall* the median ratio of
wall-clock times, which other programs on the machine disturb most. No time is a test.

## Targets

{table(["target", "measured", "at most", ""], targets)}

## Both libraries, float32

{_training(main)}

## Both libraries, bfloat16 base

{_training(half, timed=False)}

## Every parameterization of the catalog

Next to it the same method in PEFT, and in LyCORIS where it has one. None of ours should cost more than 1.50 of the frozen base:
{_over(catalog)}.

{_training(catalog)}

## Many adapters

CPU milliseconds. PEFT's times grow with the adapters loaded, so only a few are loaded.

{table(["operation", "ms"], [(name, f"{value:.3g}") for name, value in times.items()])}

Eight rows of 32 tokens, each with another adapter, no gradient, relative to the frozen base:

{table(["", "time", "least", "wall"], [(n, f"{r.cpu:.2f}", f"{r.best:.2f}", f"{r.wall:.2f}") for n, r in mixed.items()])}
"""
