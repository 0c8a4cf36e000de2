"""Finding intruder dimensions, damping them exactly, and choosing how much.

The definition and its reference stand in `theory_intruder_dimensions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.queries import SVD, as_low_rank, svd


class Intruders(NamedTuple):
    """flags (k,), cosines (k,): the largest |cos| with any base vector, tuned: the leading k triplets, top: s₀_1."""

    flags: Tensor
    cosines: Tensor
    tuned: SVD
    top: float


@torch.no_grad()
def intruders(
    base: Tensor, update: Operator, *, k: int = 10, eps: float = 0.5, side: str = "left", decomposed: SVD | None = None
) -> Intruders:
    """Finds the intruders of base + update.

    Args:
        base: W (m, n), untouched.
        update: W' - W.
        k: leading vectors looked at.
        eps: ε; a vector in a degenerate plane of the base has a cosine near 0.7, so stay below that.
        side: "left" or "right" singular vectors.
        decomposed: the decomposition of `base`, where it is at hand.
    """
    if side not in ("left", "right") or k < 1:
        raise ArgumentError(f"side is left or right and k at least 1, not {side!r} and {k}")
    wide = torch.promote_types(base.dtype, torch.float32)
    W = base.to(wide)
    first = svd(Dense(W)) if decomposed is None else decomposed
    tuned = svd(Sum(Dense(W), Dense(update.dense().to(W)))).truncated(k)
    ours, theirs = (tuned.U.t(), first.U) if side == "left" else (tuned.Vh, first.Vh.t())
    cosines = (ours @ theirs).abs().amax(1)  # (k,)
    return Intruders(cosines < eps, cosines, tuned, float(first.S[0]))


@torch.no_grad()
def scale_intruders(base: Tensor, update: Operator, damping: float, *, k: int = 10, eps: float = 0.5) -> LowRank:
    """The update with its intruders scaled by λ = damping, as an exact LoRA of rank r + #intruders.

    Raises:
        MergeError: the update has no exact factors.
    """
    pair = as_low_rank(update)
    if pair is None:
        raise MergeError(f"{type(update).__name__} {update.shape} has no exact factors; cut it with rankwise.merging.svd first")
    found = intruders(base, update, k=k, eps=eps)
    folded, U, S, Vh = pair.folded(), found.tuned.U, found.tuned.S, found.tuned.Vh
    B = (U[:, found.flags] * ((damping - 1.0) * S[found.flags])).to(folded.B)  # (m, #)
    A = Vh[found.flags].to(folded.A)  # (#, n)
    return LowRank(torch.cat([folded.B, B], dim=1), torch.cat([folded.A, A]))


def sweep(
    base: Mapping[str, Tensor],
    updates: Mapping[str, Operator],
    *,
    ks: Sequence[int] = (1, 5, 10, 20, 50),
    epsilons: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7),
) -> dict[tuple[int, float], int]:
    """(k, ε) -> number of intruders over all sites; one decomposition per matrix for the whole curve."""
    cosines = [intruders(base[site], update, k=max(ks)).cosines for site, update in updates.items()]
    return {(k, eps): sum(int((one[:k] < eps).sum()) for one in cosines) for k in ks for eps in epsilons}


def choose_damping(
    base_metric: Callable[[float], float],
    base_loss: float,
    *,
    task_metric: Callable[[float], float] | None = None,
    dampings: Sequence[float] = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0),
) -> tuple[float, list[dict[str, float]]]:
    """The largest λ at which the rise of the base's own loss is at most half of that at λ = 1, and the table it comes from.

    Args:
        base_metric: λ -> loss on the base's distribution with intruders scaled by λ.
        base_loss: that of the untouched base.
        task_metric: λ -> loss on the task, for the table.
        dampings: λ to try.

    Raises:
        ArgumentError: no λ tried halves the rise.
    """
    table = [{"damping": value, "rise": base_metric(value) - base_loss} for value in dampings]
    if task_metric is not None:
        for row in table:
            row["task"] = task_metric(row["damping"])
    whole = next((row["rise"] for row in table if row["damping"] == 1.0), None)
    rise = base_metric(1.0) - base_loss if whole is None else whole
    halved = [row["damping"] for row in table if row["rise"] <= rise / 2]
    if not halved:
        raise ArgumentError(f"no damping of {list(dampings)} halves the rise of {rise:.4g} in the base's loss: {table}")
    return max(halved), table
