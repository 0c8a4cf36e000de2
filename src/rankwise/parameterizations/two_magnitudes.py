"""BoRA: lengths of rows and of columns are trained by themselves, the direction by LoRA: DoRA made symmetric.

    V = W + s · B A,   H = diag(μ_row / ‖V‖_row) V,   W' = H diag(μ_col / ‖H‖_col)          μ_row (m,), μ_col (n,), B, A trained

μ_row and μ_col start at the lengths of W's rows and columns and B at 0, so W' = W. The second norm is taken of H, not of V:
column lengths are exactly μ_col, row lengths only near μ_row (`order="column"` has it the other way round). The norms are
constants for autograd (`detach_norm`). Scaling μ_row as a whole changes nothing. W' = diag(q) V diag(p), so a forward is q ∘
(V (p ∘ x)) + b, and q and p come from V's factors by the Gram identities of `core.queries`: no (m, n) update is formed. Zero
rows and columns of W stay zero. With dropout, y = W x + b + (W' - W) x̃. Trained numbers r(m + n) + m + n; full rank; merges
exactly. In eval without gradients q and p are kept while nothing changes.

Not the iteration that balances rows and columns until both fit, and not the block-diversified BoRA of 2025. Strength is
W + t (W' - W): scaling B A is another function.

*Differs*: order and constant norms are those of a public re-implementation; the paper's own code is not public.

Wang, Fan, Bao, Jiang, Song: BoRA: Bi-dimensional Weight-Decomposed Low-Rank Adaptation, 2024, arXiv:2412.06441.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.core.combinators import ColumnScale, Dropped, RowScale, Scaled, Sum
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Facts, Site
from rankwise.core.piece import register
from rankwise.core.queries import column_norms, row_norms
from rankwise.parameterizations.inner import build_inner, inner_piece
from rankwise.parameterizations.planned import Planned


@register("parameterization")
class TwoMagnitudes(Planned):
    """W' = diag(q) (W + s · B A) diag(p).

    Args:
        site: the layer.
        rank: r.
        alpha, scale: of LoRA's s.
        dropout: probability of dropping an input wherever the result differs from W x.
        detach_norm: treat the norms as constants in backward.
        order: which lengths are set first, "row" or "column"; the other ones are then exact.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("bora(rank=8, alpha=16)"))
    """

    facts = Facts(additive=False, exact_lora_export=False)
    own_roles = frozenset({"row_magnitude", "column_magnitude"})

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        scale: str = "lora",
        dropout: float = 0.0,
        detach_norm: bool = True,
        order: str = "row",
    ) -> None:
        super().__init__(site, dropout=dropout, detach_norm=detach_norm)
        if order not in ("row", "column"):
            raise ArgumentError(f"order is row or column, not {order!r}")
        self.order = order
        self.inner = build_inner(inner_piece(None, rank, alpha, scale), site)
        self.rank, self.scale, self.m = rank, self.inner.scale, site.m
        weight = site.weight()  # (m, n)
        self.row_magnitude = nn.Parameter(site.cast(weight.norm(dim=1)))  # (m,)
        self.column_magnitude = nn.Parameter(site.cast(weight.norm(dim=0)))  # (n,)

    def forward(self, base: Operator) -> Operator:
        q, p = self.kept(base, self._gains).split([self.m, self.column_magnitude.shape[0]])
        scaled = ColumnScale(RowScale(self.direction(base), q), p)
        if self.training and self.dropout and self.thin is not None:
            return Sum(base, Dropped(Sum(scaled, Scaled(base, -1.0)), self.dropout, self.thin))
        return scaled

    def _gains(self, base: Operator) -> Tensor:
        """Q (m,) and p (n,), one after the other."""
        V = self.direction(base)
        if self.order == "row":
            q = self.gain(self.row_magnitude, V, row_norms)
            p = self.gain(self.column_magnitude, RowScale(V, q), column_norms)
        else:
            p = self.gain(self.column_magnitude, V, column_norms)
            q = self.gain(self.row_magnitude, ColumnScale(V, p), row_norms)
        return torch.cat([q, p])

    def refresh(self, base: Operator) -> None:
        V = self.direction(base)
        self.row_magnitude.copy_(row_norms(V))
        self.column_magnitude.copy_(column_norms(V))
