"""LoRA-GA: the factors start in different singular directions of the gradient, so that the first step is that of rank 2r.

    G = U S Vᵀ          B₀ = c U_{r+1..2r} (m, r)          A₀ = c V_{1..r}ᵀ (r, n)          c = m^¼ / γ^½

G (m, n) is the mean gradient of the full weight over a few probe batches. The frozen base is W − s·B₀ A₀, so the first forward
equals the base. The first step of gradient descent moves W by −η s² (G A₀ᵀA₀ + B₀B₀ᵀ G) = −η s² c² [G]_{2r}: the best change
of rank 2r there is, from factors of rank r. With the scale s = α/√r the variance of s·B₀ A₀ x is α²/γ² for white inputs,
whatever m, n and r. `directions` splits the 2r vectors in other ways, all with the same first step: "A2rBr" swaps the halves,
"ArBr" deals them out in turns, "random" at random. `scaling`: "stable" is c; "unit" is 1; "gd" is 1/s, for the step of full
gradient descent; "weightS" the mean of (S_i(W)/s)^½ over the r largest of W. Needs 2r ≤ min(m, n). Only directions count, so
the size of the loss does not matter. Costs one full backward pass per probe batch, streamed, and one decomposition per layer.
The update against W is exact at rank 2r, in both modes.

A layer without gradient gets LoRA's own start, and a warning names it.

*Differs*: the newer port in PEFT multiplies B₀ by the singular values of G and leaves c out of A₀; this follows the authors.
Their optional clipping of the offset is left out. The decomposition is exact where the sketch of 4r columns saves nothing.

Wang, Yu, Li: LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024, arXiv:2407.05000.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rankwise.approximations.starting import check_choice, check_mode, without_gradient
from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PAIR
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALINGS = ("stable", "unit", "gd", "weightS")


@register("start")
class LoRAGA:
    """B = c U_J and A = c V_Iᵀ with I and J a split of the 2r leading directions of the gradient.

    Args:
        gamma: γ of "stable"; the larger, the smaller the start.
        directions: the split: "ArB2r", "A2rBr", "ArBr" or "random".
        scaling: the size c: "stable", "unit", "gd" or "weightS".
        mode: "offset" keeps W and subtracts the frozen start; "absorb" rewrites W.
        iterations: subspace iterations of the randomized decomposition; None decomposes exactly.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.GRADIENT})
    kind: str = PAIR  # between frozen factors a core would have no gradient: U_Jᵀ G V_I = 0
    shifted: bool = False

    def __init__(
        self,
        *,
        gamma: float = 16.0,
        directions: str = "ArB2r",
        scaling: str = "stable",
        mode: str = "offset",
        iterations: int | None = 4,
    ) -> None:
        if gamma <= 0:
            raise ArgumentError(f"gamma divides the start and is positive, not {gamma}")
        self.gamma, self.iterations, self.mode = gamma, iterations, check_mode(mode)
        self.directions = check_choice("directions", directions, DIRECTIONS)
        self.scaling = check_choice("scaling", scaling, SCALINGS)

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with BᵀB = A Aᵀ = c² I.

        Raises:
            ArgumentError: 2r directions are more than the layer has.
        """
        G, W = statistics.require_gradient(), statistics.weight  # (m, n)
        m, n = G.shape
        if 2 * rank > min(m, n):
            raise ArgumentError(
                f"{statistics.site}: LoRA-GA takes 2r = {2 * rank} directions of the gradient, but a layer of {m}×{n} has "
                f"{min(m, n)}; use rank={min(m, n) // 2} or less, or leave it out of where="
            )
        plain = without_gradient(G, rank, generator, statistics.site)
        if plain is not None:
            return plain
        U, S, Vh = truncated_svd(G, 2 * rank, iterations=self.iterations, oversampling=max(2 * rank, 8), generator=generator)
        missing = int((torch.finfo(S.dtype).eps * max(m, n) * S[0] >= S).sum())
        if missing:
            warnings.warn(
                f"{statistics.site}: the probe gradient has rank {2 * rank - missing}, less than 2r = {2 * rank}, so the other "
                "directions are arbitrary; probe with more tokens, or lower the rank",
                stacklevel=2,
            )
        left, right = self._split(rank, generator)
        size = self._size(W, m, rank, scale)
        return LowRank(size * U[:, left], size * Vh[right])

    def _split(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices (r,) of the left vectors for B and of the right vectors for A."""
        order = torch.arange(2 * rank)
        match self.directions:
            case "ArB2r":
                return order[rank:], order[:rank]
            case "A2rBr":
                return order[:rank], order[rank:]
            case "ArBr":
                return order[0::2], order[1::2]
        shuffled = torch.randperm(2 * rank, generator=generator)
        return shuffled[rank:], shuffled[:rank]

    def _size(self, W: Tensor, m: int, rank: int, scale: float) -> float:
        """The size c of both factors' vectors."""
        match self.scaling:
            case "stable":
                return m**0.25 / self.gamma**0.5
            case "gd":
                return 1.0 / scale
            case "weightS":
                return float((torch.linalg.svdvals(W)[:rank] / scale).sqrt().mean())
        return 1.0
