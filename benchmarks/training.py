"""One training step of every variant: exact costs, then times."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import interleaved
from benchmarks.model import Variant, batch_of, copy_of, llama
from rankwise.lab.counters import SavedBytes, flops_of


@dataclass(frozen=True)
class Row:
    """Costs of one variant; FLOPs and times relative to the frozen base, times NaN where they were not taken."""

    name: str
    library: str
    trained: int
    flops: float
    saved: float  # MiB
    wall: float = math.nan
    cpu: float = math.nan
    best: float = math.nan
    milliseconds: float = math.nan
    target: float | None = None


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        model(**batch).loss.backward()

    return step


def counted(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, float]:
    """FLOPs of forward and backward, and MiB that autograd keeps in between."""
    step = _step(model, batch)
    step()
    flops = flops_of(step)
    with SavedBytes([*model.parameters(), *model.buffers()]) as saved:
        loss = model(**batch).loss
    loss.backward()
    return flops, saved.total / 2**20


def rows(variants: Sequence[Variant], *, rounds: int) -> list[Row]:
    """The frozen base and the variants, on one base of shared frozen tensors."""
    base, batch = llama(), batch_of()
    frozen = copy_of(base)
    flops, saved = counted(frozen, batch)
    counters: dict[str, Row] = {"base": Row("frozen base, gradient of the input only", "", 0, 1.0, saved)}
    work: dict[str, Callable[[], Any]] = {"base": _step(frozen, batch)}
    for variant in variants:
        key = f"{variant.library} {variant.name}"
        print(f"  counting {key}", file=sys.stderr, flush=True)
        model, _ = variant.make(copy_of(base))
        mine, saved = counted(model, batch)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        counters[key] = Row(variant.name, variant.library, trained, mine / flops, saved, target=variant.target)
        work[key] = _step(model, batch)
    print(f"  timing {len(work)} variants, {rounds} rounds", file=sys.stderr, flush=True)
    times = interleaved(work, "base", rounds=rounds)
    return [Row(**{**asdict(row), **asdict(times[key])}) for key, row in counters.items()]


def half_precision(variants: Sequence[Variant]) -> list[Row]:
    """What is kept for backward on a bfloat16 base; bfloat16 times of a CPU say nothing, so none are taken."""
    base, batch = llama(torch.bfloat16), batch_of()
    flops, saved = counted(copy_of(base), batch)
    found = [Row("frozen base, gradient of the input only", "", 0, 1.0, saved)]
    for variant in variants:
        model, _ = variant.make(copy_of(base))
        mine, saved = counted(model, batch)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found.append(Row(variant.name, variant.library, trained, mine / flops, saved, target=variant.target))
    return found
