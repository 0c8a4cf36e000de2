"""PiSSA: train the principal part of the weight itself and freeze the rest.

    W = U S Vᵀ          B₀ = U_r (S_r/s)^½ (m, r)          A₀ = (S_r/s)^½ V_rᵀ (r, n)          W_res = W − s·B₀ A₀

The first forward equals the base: the layer is W_res + s·B A and s·B₀ A₀ is the best rank-r part of W. B and A both train
from the start; the first gradient step moves W by −η s (G V_r S_r V_rᵀ + U_r S_r U_rᵀ G). With mode "absorb" W is rewritten
to W_res (rank r at run time, and detaching restores W to the bit); with "offset" W stays and −s·B₀ A₀ runs beside it (another
adapter can share the base). The residual is taken from the factors as they are stored, so that rounding them cannot move the
start. Either way the update against W is exported exactly at rank 2r. Needs only the weight, at least in float32.
`iterations` asks for the randomized decomposition (4 or 16 in the release). As a compressor (s = 1) it is the plain truncated
SVD.

Not a change of what can be expressed: at equal rank the reachable set is that of LoRA shifted by −s·B₀ A₀. Dropout on the
branch would drop pretrained content, and weight decay on B and A decays it.

Meng, Wang, Zhang: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, 2024,
arXiv:2404.02948.
"""

from __future__ import annotations

import torch

from rankwise.approximations.starting import check_mode
from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class PiSSA:
    """s·B A = the best rank-r approximation of W.

    Args:
        mode: "offset" keeps W and subtracts the frozen start; "absorb" rewrites W to the residual.
        iterations: subspace iterations of the randomized decomposition; None decomposes exactly.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = PRODUCT
    shifted: bool = False

    def __init__(self, *, mode: str = "offset", iterations: int | None = None) -> None:
        self.mode, self.iterations = check_mode(mode), iterations

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with scale · B A = the best rank-r approximation of W."""
        U, S, Vh = truncated_svd(statistics.weight, rank, iterations=self.iterations, generator=generator)
        root = (S / scale).sqrt()  # (r,)
        return LowRank(U * root, root[:, None] * Vh)
