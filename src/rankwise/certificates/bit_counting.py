"""Counting bits: the two bounds, comparing adapters, and really quantizing one to the width that bounds its risk best.

The formulas and their references stand in `theory_information_bound.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError

Adapter = int | Mapping[str, Tensor] | str | Path
SCALE_BITS = 32  # one float32 step size per quantized tensor


def bits(adapter: Adapter, q: float = 16.0) -> float:
    """K: P q for a count or for tensors; eight times the size of a file, for a path (its own entropy code)."""
    if isinstance(adapter, str | Path):
        path = Path(adapter)
        if not path.is_file():
            raise ArgumentError(f"{path} is no file; pass the adapter's file, its tensors, or its number of trained numbers")
        return 8.0 * path.stat().st_size
    numbers = adapter if isinstance(adapter, int) else sum(tensor.numel() for tensor in adapter.values())
    if numbers < 0 or q < 0:
        raise ArgumentError(f"numbers and bits cannot be negative: {numbers}, {q}")
    return float(numbers) * q


def gap_it(bits: float, samples: int, *, sigma: float = 0.5) -> float:
    """The bound in expectation."""
    return math.sqrt(2.0 * sigma**2 * bits * math.log(2.0) / _positive(samples))


def gap_occam(bits: float, samples: int, *, delta: float = 0.05) -> float:
    """The bound for this model with probability 1 - δ; with no bits, Hoeffding's."""
    if not 0.0 < delta < 1.0:
        raise ArgumentError(f"delta is in (0, 1), not {delta}")
    return math.sqrt((bits * math.log(2.0) - math.log(delta)) / (2.0 * _positive(samples)))


def samples_for(gap: float, bits: float, *, sigma: float = 0.5) -> float:
    """How many samples bring the bound in expectation down to `gap`."""
    if gap <= 0:
        raise ArgumentError(f"a gap to reach is above 0, not {gap}")
    return 2.0 * sigma**2 * bits * math.log(2.0) / gap**2


def compare(adapters: Mapping[str, Adapter], samples: int, *, q: float = 16.0, sigma: float = 0.5) -> list[dict[str, Any]]:
    """One row per adapter: bits, bound, whether it is vacuous, and the ratio to the first, which is what to read."""
    if not adapters:
        raise ArgumentError("nothing to compare; pass name -> tensors, count of trained numbers, or file")
    gaps = {name: gap_it(bits(adapter, q), samples, sigma=sigma) for name, adapter in adapters.items()}
    first = next(iter(gaps.values()))
    return [
        {
            "name": name,
            "bits": bits(adapters[name], q),
            "bound": gap,
            "vacuous": gap > 1.0,
            "ratio to first": gap / first if first else math.nan,
            "samples for 0.1": samples_for(0.1, bits(adapters[name], q), sigma=sigma),
        }
        for name, gap in gaps.items()
    ]


def quantize(tensors: Mapping[str, Tensor], q: int) -> dict[str, Tensor]:
    """Each tensor on a symmetric grid of 2^q - 1 points, its step a float32 of its own: q bits per number and 32 more."""
    if q < 2:
        raise ArgumentError(f"q is at least 2 bits (a sign and a size), not {q}")
    most = 2 ** (q - 1) - 1
    result = {}
    for name, tensor in tensors.items():
        step = tensor.detach().abs().max().float() / most if tensor.numel() else torch.tensor(0.0)
        grid = (tensor.detach().double() / step.double().clamp_min(1e-300)).round().clamp(-most, most)
        result[name] = (grid * step.double()).to(tensor.dtype)
    return result


class BestQ(NamedTuple):
    """The chosen q, the quantized tensors, and a row per q tried."""

    q: int
    tensors: dict[str, Tensor]
    table: list[dict[str, float]]


def best_q(
    tensors: Mapping[str, Tensor],
    train_risk: Callable[[Mapping[str, Tensor]], float],
    samples: int,
    *,
    levels: Sequence[int] = (16, 8, 4, 3, 2),
    delta: float = 0.05,
) -> BestQ:
    """The q whose quantized adapter has the least train risk + bound; choosing among the levels costs log₂ of their number.

    Args:
        tensors: name -> trained tensor.
        train_risk: quantized tensors -> risk in [0, 1] on the training data, with those tensors in place.
        samples: N.
        levels: q to try.
        delta: δ.
    """
    table = []
    for q in levels:
        size = bits(tensors, q) + SCALE_BITS * len(tensors) + math.log2(len(levels))
        risk = float(train_risk(quantize(tensors, q)))
        gap = gap_occam(size, samples, delta=delta)
        table.append({"q": float(q), "bits": size, "train risk": risk, "bound": gap, "risk + bound": risk + gap})
    best = int(min(table, key=lambda row: row["risk + bound"])["q"])
    return BestQ(best, quantize(tensors, best), table)


def _positive(samples: int) -> int:
    if samples < 1:
        raise ArgumentError(f"samples is at least 1, not {samples}")
    return samples
