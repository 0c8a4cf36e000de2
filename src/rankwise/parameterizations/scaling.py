"""The scale s before a low-rank update."""

from __future__ import annotations

import math

from rankwise.core.errors import ArgumentError

SCALES = ("lora", "rslora", "constant")


def scale_of(policy: str, alpha: float | None, rank: int) -> float:
    """The scale s of a policy: alpha / r, alpha / √r, or alpha. alpha None means r, so that s is 1 (or √r)."""
    value = float(rank if alpha is None else alpha)
    if policy not in SCALES:
        raise ArgumentError(f"scale is one of {', '.join(SCALES)}, not {policy!r}")
    return {"lora": value / rank, "rslora": value / math.sqrt(rank), "constant": value}[policy]
