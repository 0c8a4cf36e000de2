"""MiLoRA: train the smallest singular part of the weight and freeze the rest; PiSSA's mirror image.

    W = U S Vᵀ          B₀ = U_I (S_I/s)^½ (m, r)          A₀ = (S_I/s)^½ V_Iᵀ (r, n)          I: the r smallest of min(m, n)

The frozen base is W − s·B₀ A₀, so the first forward equals the base; of all rank-r parts this one holds the least of what
pretraining put into W. `select` takes another part: "largest" is PiSSA, "middle" the window around the center, "random" any.
The factors start small (a thousandth of PiSSA's, say), so learning is slower at the same rate. "absorb" rewrites W, "offset"
lets −s·B₀ A₀ run beside it; the update against W is exact at rank 2r either way. A bf16 weight may swallow so small a part
when it is absorbed: a warning says by how much, and "offset" avoids it.

A weight of rank below min(m, n) has zeros at that end, from which nothing would ever train: refused. One exact SVD per layer,
since randomized ones do not find the small end, in float64: real weights have singular values below float32's rounding.

Wang, Li, Wang, Chen, Chen: MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning, 2024,
arXiv:2406.09044.
"""

from __future__ import annotations

import torch

from rankwise.approximations.starting import SELECTIONS, check_choice, check_mode, chosen, refuse_dead, triplets_of
from rankwise.approximations.truncated_svd import fixed_signs
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class MiLoRA:
    """s·B A = r singular components of W.

    Args:
        select: which: "smallest", "middle", "random" or "largest".
        mode: "offset" keeps W and subtracts the frozen start; "absorb" rewrites W to the residual.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = PRODUCT
    shifted: bool = False

    def __init__(self, *, select: str = "smallest", mode: str = "offset") -> None:
        self.select, self.mode = check_choice("select", select, SELECTIONS), check_mode(mode)

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with BᵀB = A Aᵀ = diag(S_I)/s.

        Raises:
            StatisticsError: singular values among those chosen are zero.
        """
        W = statistics.weight  # (m, n)
        U, S, Vh = fixed_signs(triplets_of(W.double(), rank, statistics.site))
        index = chosen(self.select, S.numel(), rank, generator)  # (r,)
        refuse_dead(S[index], S[0], max(W.shape), statistics.site, stored=W.dtype)
        root = (S[index] / scale).sqrt()  # (r,)
        return LowRank((U[:, index] * root).to(W), (root[:, None] * Vh[index]).to(W))
