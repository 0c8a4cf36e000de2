"""LoLDU: the weight's own LDU factors stay, the leading r of the diagonal are trained; r numbers per layer, and no SVD.

    W = P L diag(D) U,   W' = W + s · (P L)_r diag(z - z₀) U_r      (P L)_r (m, r), U_r (r, n) frozen; z (r,) trained, from z₀

LU with partial pivoting: P a permutation, L unit lower triangular, U unit upper triangular, D the pivots; the leading r are
those that come first in pivot order, not the largest. s = α/r. Any z₀ starts at the base, since the update counts from it;
`start` says where z lies on the line from 0 to D: at D ("lu"), their mean ("constant"), N(mean, std) ("normal") or
U(±|mean|/2) ("uniform"). With r = min(m, n), s = 1 and "lu", z = c D gives c W. L and U are not orthogonal: coordinates
interact through their Grams. An LU takes about a tenth of an SVD's time. Exactly LoRA of rank r; FLOPs as for SVFit.

Where a pivot is zero (to rounding), its row of U cannot be divided by it; it stays as it is, with D_i = 1, which keeps W = P L
diag(D) U and the direction.

*Differs* from the release: z₀ is the starting z for every start (its normal(0, 1), ones and zeros begin away from W); P is
not kept as a matrix, since (P L)_r is; s is not trained. An embedding is decomposed as its table Wᵀ = P L diag(D) U, as there:
(P L)_r and U_r change places, and the zeros of a padding token come last.

Shi, Wei, Wu, Ran, Sun, He, Yang: LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient
Fine-Tuning, 2024, arXiv:2410.13618.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.pivots import pivoted_lu
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.frame import Composed, Framed
from rankwise.parameterizations.scaling import scale_of

STARTS = ("lu", "constant", "normal", "uniform")


@register("parameterization")
class LowerUpper(Framed, Additive):
    """W' = W + s · P L diag(z - z₀) U.

    Args:
        site: the layer.
        rank: r, the number of pivots that are trained; None means all.
        alpha: numerator of s = α/r.
        start: where z starts: "lu", "constant", "normal" or "uniform".

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("loldu(rank=64)"))
    """

    frame = {"lower": "mr", "upper": "rn", "diagonal_start": "r"}
    lower: Tensor
    upper: Tensor
    diagonal_start: Tensor

    def __init__(self, site: Site, *, rank: int | None = None, alpha: float = 1.0, start: str = "lu") -> None:
        super().__init__()
        if start not in STARTS:
            raise ArgumentError(f"start is one of {', '.join(STARTS)}, not {start!r}")
        self.rank = min(site.m, site.n) if rank is None else rank
        self.scale, self.start = scale_of("lora", alpha, self.rank), start
        self.hold(site, self.rank)
        self.diagonal = nn.Parameter(self.diagonal_start.clone())  # z (r,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"diagonal"})

    def read(self, site: Site) -> Mapping[str, Tensor]:
        weight, r = site.weight(), self.rank
        table = site.layout.kind == "embedding"  # Wᵀ, whose rows are pivoted: the zeros of a padding token come last
        weight = weight.t() if table else weight
        packed, order = pivoted_lu(weight)  # (m, n), (m,)
        pivots = packed.diagonal()  # (k,)
        noise = torch.finfo(packed.dtype).eps * max(weight.shape) * pivots.abs().max()
        pivots = torch.where(pivots.abs() > noise, pivots, 1.0)[:r]  # (r,)
        lower = torch.zeros_like(weight[:, :r])  # (m, r)
        lower[order] = packed[:, :r].tril(-1) + torch.eye(*lower.shape, dtype=weight.dtype, device=weight.device)
        upper = packed[:r].triu() / pivots[:, None]  # (r, n)
        if table:
            lower, upper = upper.t(), lower.t()
        return {"lower": lower, "upper": upper, "diagonal_start": self._starting(pivots, site)}

    def _starting(self, pivots: Tensor, site: Site) -> Tensor:
        """z₀ (r,), from the leading pivots D_r."""
        mean, r = pivots.mean(), self.rank
        match self.start:
            case "constant":
                return mean.expand(r)
            case "normal":
                std = pivots.std(correction=min(1, r - 1))
                return mean + std * site.normal(r, purpose="diagonal")
            case "uniform":
                return site.uniform(r, bound=float(mean.abs()) / 2, purpose="diagonal")
        return pivots

    def update(self) -> Chain:
        return Chain(self.lower, self.diagonal - self.diagonal_start, self.upper, scale=self.scale)

    def forward(self, base: Operator) -> Operator:
        return Composed(base, self.update())

    def restart(self, site: Site) -> None:
        self.diagonal.copy_(self.diagonal_start)
