"""HRA: the weight is multiplied by a chain of r Householder reflections, an orthogonal map that moves only r directions.

    W' = W H,   H = (I - 2 û_1 û_1ᵀ) … (I - 2 û_r û_rᵀ),   û_i = u_i / ‖u_i‖          U = (u_1, …, u_r) (n, r) trained

H is applied in its compact form H = I - Û T Ûᵀ, with T (r, r) upper triangular and T⁻¹ = I/2 + the part of ÛᵀÛ above the
diagonal: 4nr FLOPs per token on x, and 2nr² + 2nr² per step for the Gram matrix and Û T; neither H nor W H is formed (a
convolution forms W'). U starts as r/2 random vectors, each twice, whose reflections cancel, so H = I with a gradient; r is
even. A zero u_i reflects nothing. Trained numbers n r, half of LoRA's. The length of u_i does not matter, so weight decay
changes step sizes only.

Not additive, but W' - W = -(W Û T) Ûᵀ has rank r: it exports as LoRA exactly, with factors that depend on W, so they must be
made again for another base. `gram_schmidt` orthonormalizes U first, H = I - 2 Q Qᵀ (the limit of the paper's orthogonality
penalty); such an H never is I and doubled columns have no orthonormal form, so it needs start="random", which begins away
from W.

*Differs*: the library starts odd r, and doubled columns under Gram-Schmidt, away from W with at most a warning; both are
refused.

Yuan, Liu, Xu: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024,
arXiv:2405.17484.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Rotated
from rankwise.core.errors import ArgumentError
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.queries import full_precision, wide


class NearIdentity(Operator):
    """I + moved, with a square operator of low rank."""

    def __init__(self, moved: LowRank) -> None:
        self.moved = moved

    @property
    def shape(self) -> tuple[int, int]:
        return self.moved.shape

    def dense(self) -> Tensor:
        moved = self.moved.dense()
        return moved + torch.eye(len(moved), dtype=moved.dtype, device=moved.device)

    def transposed(self) -> NearIdentity:
        return NearIdentity(LowRank(self.moved.A.t(), self.moved.B.t(), self.moved.scale))

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self.moved.add_to(x, x, layout) if isinstance(layout, LinearLayout) else super().apply(x, layout)


@register("parameterization")
class Householder(Parameterization):
    """W' = W H, H a chain of reflections.

    Args:
        site: the layer.
        rank: r, the number of reflections.
        gram_schmidt: orthonormalize U before reflecting.
        start: "paired", where reflections cancel and W' = W, or "random", where W' is not W.
    """

    facts = Facts(additive=False, layouts=frozenset({"linear", "conv"}))

    def __init__(self, site: Site, *, rank: int = 8, gram_schmidt: bool = False, start: str = "paired") -> None:
        super().__init__()
        self.rank, self.gram_schmidt = rank, gram_schmidt
        drawn = rank // 2 if start == "paired" else rank
        columns = site.uniform(site.n, drawn, bound=1.0 / math.sqrt(drawn))
        self.U = nn.Parameter(columns.repeat_interleave(2, dim=1) if start == "paired" else columns)  # (n, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        rank, gram_schmidt, start = (arguments.get(key) for key in ("rank", "gram_schmidt", "start"))
        rank, start = 8 if rank is None else rank, start or "paired"
        if start not in ("paired", "random"):
            raise ArgumentError(f"start is paired or random, not {start!r}")
        if start == "paired" and (rank % 2 or gram_schmidt):
            why = "orthonormal columns cannot be equal" if gram_schmidt else f"rank is {rank}, and columns come in pairs"
            raise ArgumentError(
                f"hra starts at the base by pairs of equal reflections: {why}. Use an even rank without gram_schmidt, or "
                "start='random', which begins away from the base"
            )
        return frozenset({"U"})

    def moved(self) -> LowRank:
        """H - I = -(Û T) Ûᵀ, in at least float32."""
        with full_precision():
            U = wide(self.U)
            if self.gram_schmidt:
                Q, _ = torch.linalg.qr(U)  # (n, r)
                return LowRank(Q, Q.t(), -2.0)
            square = U.square().sum(0)  # (r,)
            unit = U * torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)
            inverse = torch.triu(unit.t() @ unit, 1)  # (r, r)
            inverse = inverse + torch.eye(self.rank, dtype=unit.dtype, device=unit.device) / 2
            T = torch.linalg.solve_triangular(inverse, torch.eye(self.rank, dtype=unit.dtype, device=unit.device), upper=True)
            return LowRank(-(unit @ T), unit.t())

    def rotation(self) -> Operator:
        """H (n, n): W' = W H."""
        return NearIdentity(self.moved())

    def forward(self, base: Operator) -> Operator:
        return Rotated(base, self.rotation(), side="input")

    def total_update(self, untouched: Operator) -> Operator:
        """W (H - I), of rank r."""
        return Rotated(untouched, self.moved(), side="input")
