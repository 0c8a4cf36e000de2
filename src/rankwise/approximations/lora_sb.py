"""LoRA-SB: start at the best rank-r approximation of the first step that full fine-tuning with Adam would take.

    D₀ = −η₀ sign(Σ G)          D₀ = U S Vᵀ          s·B A = U_r S_r V_rᵀ          U_r (m, r), V_r (n, r)

The published method trains an (r, r) core between frozen factors (the parameterization `lora_xs` with scale 1): B = U_r and
A = V_rᵀ orthonormal and R = diag(S_r), so that the gradient of R is the projection BᵀG Aᵀ itself and plain Adam needs no
correction. This file gives the product; each parameterization places it in its own factors. On purpose the model starts at
W + [D₀]_r; W is kept. sign(0) = 0, so entries that no sample touched stay. η₀ is the rate of the first warm-up step, the
learning rate divided by the number of warm-up steps; with η₀ near 1 the start would destroy the model.

A layer without gradient gets LoRA's own start, and a warning names it.

*Differs*: factors are kept in float32, where the release casts to bfloat16 and loses orthonormality at 1e-2. `sign=False`
takes the gradient itself (the first step of SGD), `compensate=True` subtracts the start from the base; both are variants seen
elsewhere.

Ponkshe, Singhal, Gorbunov, Tumanov, Horvath, Vepakomma: Initialization using Update Approximation is a Silver Bullet for
Extremely Efficient Low-Rank Fine-Tuning, 2024, arXiv:2411.19557.
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
class LoRASB:
    """s·B A = [−η₀ sign(G)]_r.

    Args:
        learning_rate: of the training that follows.
        warmup_steps: η₀ = learning_rate / warmup_steps.
        sign: take the sign of the gradient, as Adam's first step does.
        compensate: subtract the start from the base, so that the first forward equals it.
        iterations: subspace iterations of the randomized decomposition; None decomposes exactly.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.GRADIENT})
    kind: str = PRODUCT
    mode: str = "offset"

    def __init__(
        self,
        *,
        learning_rate: float = 1e-4,
        warmup_steps: int = 1,
        sign: bool = True,
        compensate: bool = False,
        iterations: int | None = 10,
    ) -> None:
        if learning_rate <= 0 or warmup_steps < 1:
            raise ArgumentError(
                f"learning_rate is positive and warmup_steps is 1 or more, not {learning_rate} and {warmup_steps}: the start "
                "is a step of size learning_rate / warmup_steps"
            )
        self.first_rate, self.sign, self.iterations = learning_rate / warmup_steps, sign, iterations
        self.shifted = not compensate

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with scale · B A = the best rank-r approximation of D₀."""
        G = statistics.require_gradient()  # (m, n)
        plain = without_gradient(G, rank, generator, statistics.site)
        if plain is not None:
            return plain
        # The rate comes in after the decomposition: with η₀ = 1e-6 the entries of D₀ are small, those of sign(G) are not.
        U, S, Vh = truncated_svd(-G.sign() if self.sign else -G, rank, iterations=self.iterations, generator=generator)
        root = (S * (self.first_rate / scale)).sqrt()  # (r,)
        return LowRank(U * root, root[:, None] * Vh)
