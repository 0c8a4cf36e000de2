"""MiCA: the output factor is frozen at the directions that the weight uses least; only A trains.

    W = U S Vᵀ          B = the last r columns of U (m, r), orthonormal, frozen          A = 0 (r, n), trained

The update is zero, so the first forward equals the base to the bit, and W is untouched. Everything A learns comes out in the r
output directions with the smallest singular values. Trained numbers r·n; exported as plain LoRA of rank r. The frozen B is a
matter of the parameterization: the catalog's `mica` composes this start with LoRA's `freeze_output`, and with one that trains B
it is refused. One exact SVD per layer.

Not MiLoRA, which trains the smallest components themselves, both factors, and moves them out of the base.

No paper: read from the release, `init_lora_weights="mica"` of the PEFT library, 0.21.
"""

from __future__ import annotations

import torch

from rankwise.approximations.starting import triplets_of
from rankwise.approximations.truncated_svd import fixed_signs
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import FROZEN_OUTPUT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class MiCA:
    """B = the left singular vectors of the r smallest singular values of W, A = 0."""

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = FROZEN_OUTPUT
    shifted: bool = False
    mode: str = "none"

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, 0), B orthonormal."""
        W = statistics.weight  # (m, n)
        U = fixed_signs(triplets_of(W, rank, statistics.site)).U  # (m, k)
        return LowRank(U[:, -rank:], W.new_zeros(rank, W.shape[1]))
