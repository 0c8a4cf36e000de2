"""Orthogonal start: both factors begin away from zero and their product is zero, since they use complementary rank spaces.

    r = r₁ + r₂          Q = [Q₁; Q₂] (r, r) orthogonal          X (n, r₁), Y (m, r₂) with independent N(0, 1) entries
    A₀ = σ (X Q₁)ᵀ (r, n)          B₀ = σ Y Q₂ (m, r)          B₀ A₀ = σ² Y Q₂ Q₁ᵀ Xᵀ = 0

W is untouched and the first forward equals the base, yet neither factor has a gradient of zero at step 0 (LoRA's A does): the
first step of size η moves the update by −s η (dB A + B dA), twice LoRA's. Each factor has rank r/2 and fills its missing half
first. Plain LoRA of rank r. Weight decay acts on B from the first step on. Odd r gives A the larger half.

*Differs* from the release, where Q is random: here Q is made of 2 × 2 blocks [1 1; 1 −1]/√2, so that rows of A come in equal
pairs and columns of B in opposite ones. Any orthogonal Q gives the same function (B Tᵀ, T A), but under this one the zero
survives rounding: on a bf16 base of 256 × 256 with r = 16 and s = 2 a random Q moves the first output by 0.3 %, this one not
at all. Odd ranks are allowed.

No paper: Datta: Rethink LoRA initialisation, 2025 (web log), and pull requests 2389 and 2498 of the PEFT library.
"""

from __future__ import annotations

import torch

from rankwise.approximations.truncated_svd import check_rank
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PAIR
from rankwise.core.piece import register
from rankwise.core.statistics import LayerStatistics, Statistic


@register("start")
class OrthogonalStart:
    """B and A random with B A = 0.

    Args:
        std: σ; entries of both factors have the standard deviation σ/√2.
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    kind: str = PAIR
    shifted: bool = False
    mode: str = "none"

    def __init__(self, *, std: float = 0.1) -> None:
        if std <= 0:
            raise ArgumentError(f"std is the size of the entries and positive, not {std}; with 0 nothing would ever train")
        self.std = std

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, A) with B A = 0.

        Raises:
            ArgumentError: rank 1, which cannot be halved.
        """
        W = statistics.weight
        m, n = W.shape
        check_rank(rank, m, n)
        if rank < 2:
            raise ArgumentError(
                f"{statistics.site}: an orthogonal start halves the rank, so it takes rank 2 or more, not {rank}"
            )
        larger, smaller = (rank + 1) // 2, rank // 2
        X = torch.randn(n, larger, generator=generator, dtype=torch.float64)  # (n, r₁)
        Y = torch.randn(smaller, m, generator=generator, dtype=torch.float64).t()  # (m, r₂)
        half = self.std * 0.5**0.5
        A = (X * half).repeat_interleave(2, dim=1)  # (n, 2 r₁): columns in equal pairs
        B = (Y * half).repeat_interleave(2, dim=1)  # (m, 2 r₂)
        B[:, 1::2] *= -1
        if rank % 2:  # the last direction stands alone: all of it in A
            A = torch.cat([A[:, : rank - 1], X[:, -1:] * self.std], dim=1)
            B = torch.cat([B, B.new_zeros(m, 1)], dim=1)
        return LowRank(B.to(W), A.t().contiguous().to(W))
