"""LoRA-One: start at one low-rank step of full fine-tuning.

    −G = U S Vᵀ          B₀ = U_r S_r^½ / √(S₁ γ) (m, r)          A₀ = S_r^½ V_rᵀ / √(S₁ γ) (r, n)

G (m, n) is the mean gradient of the full weight over a few probe batches. W is kept and nothing is subtracted: on purpose the
model starts at W − s/(γ S₁)·[G]_r, a step of descent, with balanced factors (B₀ᵀB₀ = A₀A₀ᵀ) whose largest singular value is
γ^(-½). Dividing by S₁ makes the start independent of the loss's scale. Costs one full backward pass per probe batch, streamed
so that one layer's gradient is alive at a time, and one decomposition per layer; exported at rank r as it is.

A layer whose gradient is zero has nothing to read; it gets LoRA's own start, and a warning names it. Directions beyond the rank
of G start with a zero column and row and stay there: probe with at least r tokens. The theory's preconditioner is the step
`scaled_gd`, not a part of the start.

*Differs*: the paper's box multiplies by γ, the released code divides; this follows the code, whose γ = 128 is the published
setting. `normalize_by_sigma1=False` leaves S₁ out. Matrices smaller than twice the sketch are decomposed exactly.

Zhang, Liu, Chen: LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably and
Efficiently, 2025, arXiv:2502.01235.
"""

from __future__ import annotations

import torch

from rankwise.approximations.starting import without_gradient
from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class LoRAOne:
    """s·B A = −s/(γ S₁) · [G]_r.

    Args:
        gamma: γ; with the scale s it sets the size s/γ of the first step.
        normalize_by_sigma1: divide by the largest singular value of G.
        probes: columns of the sketch in the randomized decomposition.
        iterations: its subspace iterations; None decomposes exactly.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.GRADIENT})
    kind: str = PRODUCT
    shifted: bool = True
    mode: str = "offset"

    def __init__(
        self, *, gamma: float = 128.0, normalize_by_sigma1: bool = True, probes: int = 512, iterations: int | None = 16
    ) -> None:
        if gamma <= 0:
            raise ArgumentError(f"gamma divides the first step and is positive, not {gamma}")
        self.gamma, self.normalize_by_sigma1, self.probes, self.iterations = gamma, normalize_by_sigma1, probes, iterations

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with B A = −[G]_r / (γ S₁)."""
        G = statistics.require_gradient()  # (m, n)
        plain = without_gradient(G, rank, generator, statistics.site)
        if plain is not None:
            return plain
        oversampling = max(self.probes - rank, 0)
        U, S, Vh = truncated_svd(-G, rank, iterations=self.iterations, oversampling=oversampling, generator=generator)
        size = self.gamma * S[0] if self.normalize_by_sigma1 else torch.full_like(S[0], self.gamma)
        root = (S / size).sqrt()  # (r,)
        return LowRank(U * root, root[:, None] * Vh)
