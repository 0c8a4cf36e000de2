"""Linear combination and task arithmetic of updates, in the space of the updates themselves.

    linear            Δ = Σ_i w_i D_i, truncated to the common rank r = max r_i by its singular values
    task_arithmetic   Δ = λ Σ_i w_i D_i, whole: factors of rank Σ r_i where the updates have factors, dense elsewhere

with D_i = s_i B_i A_i (m, n). Nothing is trained. The truncation error of `linear` is what `merge_adapters` reports.

*Differs* from PEFT's "linear", which combines the factors: B' = Σ √|w_i s_i| B_i, A' = Σ sign(w_i s_i) √|w_i s_i| A_i. Its
product holds the cross terms B_i A_j (i ≠ j) that no adapter was trained with: two adapters with w = (1, -1) give
Σ w_i D_i + B_2 A_1 - B_1 A_2. It is right only for N = 1 or a shared factor; `compat="peft"` reproduces it for comparisons.

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi: Editing Models with Task Arithmetic, 2022,
arXiv:2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rankwise.core.combinators import Scaled
from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.merging.exact import svd
from rankwise.merging.operands import checked_weights, factors_of, refuse_dense, stacked, weighted_sum, wide


@torch.no_grad()
def linear(
    updates: Sequence[Operator],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    compat: str | None = None,
) -> LowRank:
    """Σ w_i D_i, cut to the common rank.

    Args:
        updates: D_i (m, n), each with exact factors.
        weights: w_i; None means 1 for each.
        rank: of the result. None means the largest r_i.
        compat: "peft" combines the factors instead, cross terms and all; the ranks must agree then.

    Raises:
        MergeError: shapes differ, an update has no factors, or compat="peft" with different ranks.
        ArgumentError: an unknown compat, or a rank below 1.
    """
    values = checked_weights(updates, weights)
    if compat not in (None, "peft"):
        raise ArgumentError(f"compat is None or 'peft', not {compat!r}")
    if compat == "peft":
        return _factor_space(updates, values, rank)
    ranks = [pair.rank for pair in factors_of(updates)]
    return svd(updates, values, rank=max(1, *ranks) if rank is None else rank)


@torch.no_grad()
def task_arithmetic(updates: Sequence[Operator], weights: Sequence[float] | None = None, *, scale: float = 1.0) -> Operator:
    """λ Σ w_i D_i, whole.

    Args:
        updates: D_i (m, n); dense ones stay dense.
        weights: w_i; None means 1 for each.
        scale: λ.
    """
    values = [weight * scale for weight in checked_weights(updates, weights)]
    if all(as_low_rank(update) is not None for update in updates):
        return stacked(updates, values)
    return weighted_sum(updates, values)


def _factor_space(updates: Sequence[Operator], weights: Sequence[float], rank: int | None) -> LowRank:
    """PEFT's combination: the factors are added, each with the square root of |w_i s_i|."""
    pairs: list[LowRank] = []
    for position, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        pair = as_low_rank(Scaled(update, float(weight)))  # the weight joins the scale, B and A stay as they were trained
        if pair is None:
            refuse_dense(update, position)
        pairs.append(pair)
    ranks = {pair.rank for pair in pairs}
    if len(ranks) > 1 or (rank is not None and {rank} != ranks):
        raise MergeError(
            f"compat='peft' adds the factors, so all ranks must agree with each other and with rank=; found ranks "
            f"{[pair.rank for pair in pairs]} and rank={rank}. Leave compat away: any ranks will do then"
        )
    B, A = torch.zeros_like(wide(pairs[0].B)), torch.zeros_like(wide(pairs[0].A))  # (m, r), (r, n)
    for pair in pairs:
        root = math.sqrt(abs(pair.scale))
        B = B + wide(pair.B) * root
        A = A + wide(pair.A) * math.copysign(root, pair.scale)
    return LowRank(B, A)
