"""Exact merges: concatenation of the factors, and its best truncation through a small core.

    cat   B' = [B_1 … B_N] (m, Σr),  A' = [w_1 s_1 A_1; …; w_N s_N A_N] (Σr, n)      B' A' = Σ_i w_i s_i B_i A_i
    svd   B' = U S (m, r'),  A' = Vᵀ (r', n),  with U S Vᵀ the leading part of Σ_i w_i s_i B_i A_i

Concatenation is exact for any mixture of ranks and scales; what it costs is rank. The decomposition of the sum is found from
B' = Q_B R_B, A'ᵀ = Q_A R_A and the Σr × Σr core R_B R_Aᵀ, in O((m + n)(Σr)² + (Σr)³), so that no (m, n) matrix is formed
while Σr < min(m, n). Its truncation to r' is the best of that rank: error² = Σ_{k>r'} σ_k².

Not a merge of methods: DoRA and other multiplicative updates have no exact factors; `svd` takes their dense difference.

*Differs* from PEFT's `svd` combination: a scale enters once (PEFT multiplies it into the delta and into the weight), and the
result has scale 1 whatever the inputs had (rsLoRA's α/√r included).

Eckart, Young: The Approximation of One Matrix by Another of Lower Rank, 1936, for the truncation; the concatenation is the
definition of the sum in factors and has no paper of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.merging.operands import best, checked_weights, stacked, weighted_sum, wide


@torch.no_grad()
def cat(updates: Sequence[Operator], weights: Sequence[float] | None = None) -> LowRank:
    """Σ w_i D_i exactly, at rank Σ r_i.

    Args:
        updates: D_i (m, n), each with exact factors; ranks and scales may differ.
        weights: w_i; None means 1 for each.

    Raises:
        MergeError: shapes differ, or an update has no exact factors.
    """
    return stacked(updates, checked_weights(updates, weights))


@torch.no_grad()
def svd(
    updates: Sequence[Operator],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    clamp_quantile: float | None = None,
) -> LowRank:
    """The best rank-r' approximation of Σ w_i D_i.

    Args:
        updates: D_i (m, n). Dense ones are taken too, at the cost of a dense decomposition.
        weights: w_i; None means 1 for each.
        rank: r'. None keeps all of Σ r_i, which is exact; a rank above it adds nothing.
        clamp_quantile: clamp the entries of B' and A' to this quantile of their sizes; None does not.

    Raises:
        ArgumentError: rank is below 1, or the quantile is not in (0, 1].
    """
    values = checked_weights(updates, weights)
    if rank is not None and rank < 1:
        raise ArgumentError(f"rank is at least 1, not {rank}")
    if clamp_quantile is not None and not 0.0 < clamp_quantile <= 1.0:
        raise ArgumentError(f"clamp_quantile is in (0, 1], not {clamp_quantile}")
    factored = all(as_low_rank(update) is not None for update in updates)
    total: Operator = stacked(updates, values) if factored else weighted_sum(updates, values)
    full = min(*total.shape, total.rank) if isinstance(total, LowRank) else min(total.shape)
    pair, _ = best(total, full if rank is None else min(rank, full))
    if clamp_quantile is None:
        return pair
    sizes = torch.cat([wide(pair.B).abs().flatten(), wide(pair.A).abs().flatten()])
    # kthvalue, since torch.quantile refuses more than 16 million numbers
    bound = float(sizes.kthvalue(max(1, round(clamp_quantile * sizes.numel()))).values)
    return LowRank(pair.B.clamp(-bound, bound), pair.A.clamp(-bound, bound))
