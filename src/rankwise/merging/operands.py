"""What every merger checks and needs: updates of one shape, weights, their factors, and the exact error of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from rankwise.core.combinators import Scaled, Sum
from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.queries import SVD, as_low_rank
from rankwise.core.queries import svd as decompose


def checked_weights(updates: Sequence[Operator], weights: Sequence[float] | None) -> list[float]:
    """One weight per update; None means 1 for each, the plain sum.

    Raises:
        MergeError: no updates, updates of different shapes, or updates with NaN.
        ArgumentError: another number of weights, or a weight that is not finite.
    """
    if not updates:
        raise MergeError("nothing to merge: pass at least one update")
    shapes = [update.shape for update in updates]
    if len(set(shapes)) > 1:
        raise MergeError(f"the updates have different shapes {shapes}; only updates of the same layer can be merged")
    values = [1.0] * len(updates) if weights is None else [float(weight) for weight in weights]
    if len(values) != len(updates):
        raise ArgumentError(f"{len(updates)} updates need {len(updates)} weights, but {len(values)} were given: {values}")
    if not all(torch.isfinite(torch.tensor(values)).tolist()):
        raise ArgumentError(f"weights must be finite numbers, not {values}")
    return values


def factors_of(updates: Sequence[Operator]) -> list[LowRank]:
    """Every update as (B, A) in at least float32, scale folded into B, cut off from autograd.

    Raises:
        MergeError: an update has no exact factors; names which.
    """
    found: list[LowRank] = []
    for position, update in enumerate(updates):
        pair = as_low_rank(update)
        if pair is None:
            refuse_dense(update, position)
        folded = pair.folded()
        found.append(LowRank(wide(folded.B), wide(folded.A)))
        if not (torch.isfinite(found[-1].B).all() and torch.isfinite(found[-1].A).all()):
            raise MergeError(f"update number {position} holds NaN or infinity; load an earlier checkpoint of that adapter")
    common = torch.float32
    for pair in found:
        common = torch.promote_types(common, torch.promote_types(pair.B.dtype, pair.A.dtype))
    return [LowRank(pair.B.to(common), pair.A.to(common)) for pair in found]


def refuse_dense(update: Operator, position: int) -> NoReturn:
    """Says that an update has no factors, with its numerical rank, and the way out."""
    S = decompose(update).S  # (min(m, n),)
    smallest = max(update.shape) * torch.finfo(S.dtype).eps * float(S.max())
    rank = int((smallest < S).sum())
    raise MergeError(
        f"update number {position} ({type(update).__name__} {update.shape}) has no exact low-rank factors; its numerical "
        f"rank is {rank}. Use svd with rank=, which takes dense updates and reports its error, or task_arithmetic, which keeps "
        "them dense"
    )


def weighted_sum(updates: Sequence[Operator], weights: Sequence[float]) -> Operator:
    """Σ w_i D_i as an operator, exact, nothing computed."""
    return Sum(*(Scaled(update, float(weight)) for update, weight in zip(updates, weights, strict=True)))


def stacked(updates: Sequence[Operator], weights: Sequence[float]) -> LowRank:
    """Σ w_i D_i as the pair [B_1 … B_N] (m, Σr), [w_1 A_1; …; w_N A_N] (Σr, n)."""
    pairs = factors_of(updates)
    B = torch.cat([pair.B for pair in pairs], dim=1)  # (m, Σr)
    A = torch.cat([pair.A * weight for pair, weight in zip(pairs, weights, strict=True)], dim=0)  # (Σr, n)
    return LowRank(B, A)


def best(target: Operator, rank: int) -> tuple[LowRank, SVD]:
    """The best rank-`rank` pair (B = U S, A = Vᵀ) of an operator, and its whole decomposition."""
    found = decompose(target)
    top = found.truncated(rank)
    return LowRank(top.U * top.S, top.Vh), found


def relative_error(result: Operator, updates: Sequence[Operator], weights: Sequence[float]) -> tuple[float, float]:
    """(‖result - Σ w_i D_i‖_F / ‖Σ w_i D_i‖_F, ‖Σ w_i D_i‖_F), through the small cores where there are factors.

    The norms are those of singular values, not of Gram matrices, so that an exact result shows an error near 1e-16 and not the
    1e-8 that the subtraction of two squares would leave.
    """
    with torch.no_grad():
        exact = as_double(weighted_sum(updates, weights))
        difference = Sum(as_double(result), Scaled(exact, -1.0))
        norm = float(decompose(exact).S.norm())
        error = float(decompose(difference).S.norm())
    return (error / norm if norm > 0 else error), norm


def as_double(operator: Operator) -> Operator:
    """The same numbers in float64, by factors where there are some."""
    pair = as_low_rank(operator)
    if pair is None:
        return Dense(operator.dense().detach().double())
    folded = pair.folded()
    return LowRank(folded.B.detach().double(), folded.A.detach().double())


def wide(tensor: Tensor) -> Tensor:
    """Detached, in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
