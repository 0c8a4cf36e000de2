"""OLoRA: the output factor starts as orthonormal columns of the weight, by a QR decomposition instead of PiSSA's SVD.

    W[:, :r] = Q R_r          B₀ = Q (m, r) orthonormal          A₀ = Qᵀ W (r, n) = the first r rows of R in W = Q R

The frozen base is W − s·B₀ A₀, so the first forward equals the base. No division by the scale s: with s = 1 the first r columns
of W go whole into the trained part, otherwise (1 − s) of them stays. Unpivoted, on purpose: the choice depends on the order of
the inputs, and the residual is at least that of PiSSA at the same rank. Only the first r columns need reflecting, O(m n r).
"absorb" rewrites W, "offset" lets −s·B₀ A₀ run beside it; the update against W is exact at rank 2r either way.

B is orthonormal at the start only; nothing keeps it so. Where the leading columns of W depend on each other some rows of A₀ are
short, but their columns of B still train.

Büyükakyüz: OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024, arXiv:2406.01775.
"""

from __future__ import annotations

import torch

from rankwise.approximations.starting import check_mode
from rankwise.approximations.truncated_svd import check_rank
from rankwise.core.errors import StatisticsError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class OLoRA:
    """B = the first r columns of Q and A = the first r rows of R in W = Q R.

    Args:
        mode: "offset" keeps W and subtracts the frozen start; "absorb" rewrites W to the residual.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = PRODUCT
    shifted: bool = False

    def __init__(self, *, mode: str = "offset") -> None:
        self.mode = check_mode(mode)

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A), B orthonormal, A upper trapezoidal."""
        W = statistics.weight  # (m, n)
        check_rank(rank, *W.shape)
        if not torch.isfinite(W).all():
            raise StatisticsError(f"{statistics.site}: the weight holds NaN or infinity; load it again")
        B = torch.linalg.qr(W[:, :rank])[0]  # (m, r)
        return LowRank(B, torch.triu(B.t() @ W))  # below the diagonal there is only rounding
