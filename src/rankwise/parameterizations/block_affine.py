"""Bat (Bone as first published): every block of the weight is multiplied by a small matrix, which is added as well.

    W'_ij = W_ij + W_ij D_k + D_k          blocks r × r; D (m/r, r, r) with k = i ("row"), or D (n/r, r, r) with k = j ("col")

D starts at zero, so W' = W. Not additive, since D acts through W, and in general of full rank, so it exports as LoRA only by
truncation; r divides m and n. Row: W' is made in every forward, 2mnr FLOPs whatever the number of tokens. Column: the inputs
are rotated block by block, 4nr + 2mr FLOPs per token, and W' is never formed. Trained numbers r m, or r n. No α and no
scale; the learning rate is that of full fine-tuning. In a convolution n counts channels · kernel.

*Differs*: the two releases share D along different axes; both are here, "row" is the library's.

Kang: Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models, 2024,
arXiv:2409.15371 (later versions: DiSHA, then MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Rotated, Sum
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.structured import BlockDiagonal
from rankwise.parameterizations.blocks import LAYOUTS, largest_divisor, problem, tiled_identity


class BlockRows(Operator):
    """W_ij + W_ij D_i + D_i: every row of blocks times one (r, r) matrix, plus it; D (m/r, r, r)."""

    def __init__(self, base: Operator, D: Tensor) -> None:
        self.base, self.D = base, D

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def dense(self) -> Tensor:
        (m, n), r = self.base.shape, self.D.shape[1]
        weight = self.base.dense()
        W = weight.reshape(m // r, r, n // r, r).to(torch.promote_types(weight.dtype, self.D.dtype))  # W_ij = W[i, :, j, :]
        moved = torch.einsum("iajb,ibc->iajc", W, self.D.to(W.dtype))
        return (W + moved + self.D[:, :, None, :]).reshape(m, n)


@register("parameterization")
class BlockAffine(Parameterization):
    """W'_ij = W_ij (I + D) + D, bat.

    Args:
        site: the layer.
        rank: r, the size of a block.
        axis: "row" for one D per row of blocks, "col" for one per column.
    """

    facts = Facts(additive=False, exact_lora_export=False, layouts=LAYOUTS)

    def __init__(self, site: Site, *, rank: int = 64, axis: str = "row") -> None:
        super().__init__()
        if axis not in ("row", "col"):
            raise ArgumentError(f"axis is row or col, not {axis!r}")
        self.rank, self.axis = rank, axis
        self.D = nn.Parameter(site.zeros((site.m if axis == "row" else site.n) // rank, rank, rank))  # (m/r or n/r, r, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"D"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        rank = arguments.get("rank", 64)
        if rank < 1 or (site.m % rank == 0 and site.n % rank == 0):
            return []
        remedy = f"use a common divisor, such as rank={largest_divisor(rank, site.m, site.n)}, or mode='miss', which pads"
        return [problem(site, "a rank that divides m and n", f"rank {rank} for a layer of {site.m} × {site.n}", remedy)]

    def forward(self, base: Operator) -> Operator:
        if self.axis == "row":
            return BlockRows(base, self.D)
        m, n = base.shape
        rotation = BlockDiagonal(self.D + torch.eye(self.rank, dtype=self.D.dtype, device=self.D.device))
        beside = self.D.permute(1, 0, 2).reshape(self.rank, n)  # (r, n): D_1 D_2 …
        return Sum(Rotated(base, rotation, side="input"), LowRank(tiled_identity(beside, self.rank, m).t(), beside))
