"""Nyström start (NoRA): a random sketch of the weight's rows as the input factor.

    A₀ = σ Ω W / s (r, n)          B₀ = 0          Ω (r, m) with independent N(0, 1) entries

The update is zero, so the first forward equals the base to the bit and W is untouched. The rows of A₀ lie in the row space of W
and lean towards its strong directions: E[A₀ᵀA₀] = (σ/s)² r WᵀW. One product O(r m n), no decomposition. In matrix factorization
the same sketch makes ScaledGD converge in one step or quadratically (see the problem `matrix_nystrom_scaledgd`).

NoRA+, the normalized preconditioner of the same paper, is a step and not a part of this start. Other papers use the name NoRA
for nested or normalized adapters.

*Differs*: the released code, as read, draws the sketch before the pretrained weight is in place; this follows the formula.

Li, Zhang, Mokhtari, He: On the Crucial Role of Initialization for Matrix Factorization, 2024, arXiv:2410.18965.
"""

from __future__ import annotations

import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import INPUT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class NystromNoRA:
    """A = σ Ω W / s, B = 0.

    Args:
        sigma: σ, the size of the sketch.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = INPUT
    shifted: bool = False
    mode: str = "offset"

    def __init__(self, *, sigma: float = 0.02) -> None:
        if sigma <= 0:
            raise ArgumentError(f"sigma is the size of the sketch and positive, not {sigma}; with 0 nothing would ever train")
        self.sigma = sigma

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (0, A), A a sketch of the rows of W."""
        W = statistics.weight  # (m, n)
        sketch = torch.randn(rank, W.shape[0], generator=generator, dtype=torch.float64).to(W)  # (r, m)
        return LowRank(W.new_zeros(W.shape[0], rank), (sketch @ W) * (self.sigma / scale))
