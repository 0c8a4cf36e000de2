"""OFT: the inputs of a layer are rotated block by block, which keeps the lengths of the weight's rows and their angles.

    W' = W Dᵀ,   D = diag(R_1, …, R_k),   R_i = (I - Q_i)(I + Q_i)⁻¹          n = k b, blocks (b, b)

`skew` (k, b(b-1)/2) holds the upper triangles, row by row, of Q_i = U_i - U_iᵀ; it starts at zero, so D = I and W' = W. The
rows of x are rotated, y = W (Dᵀ x) + bias, by k small products: neither D nor W' is formed (a convolution forms W', whose n
counts channels · kernel). `side="output"` is the first version of the paper, W' = D W with m = k b. An embedding has no
inputs to rotate; its vectors are, e' = Dᵀ e. `share_blocks` has one R for all blocks. `constrain` scales every Q_i back to a
norm of at most constrain / √k (COFT). Trained numbers n(b-1)/2, extra FLOPs 2nb per token. Not additive; the change has full
rank in general, so it exports as LoRA only by truncation. No α and no scale.

`cayley="neumann"` replaces the inverse by a series of `terms` terms. Published code writes that series with the other sign,
so the same tensor means the transposed rotation there; it does here too, and the sign is kept beside the tensor (`sense`),
so that a tensor loaded into the other mode still means the rotation it was trained as.

*Differs*: with dropout each block is replaced by I with that probability, independently; the release drops int(p k) of them,
which is none for small p k, and in the library the option has no effect. COFT scales inside the forward and differentiates
through it; the release overwrites the tensor. The inverse is the default here, the series in the library.

Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schölkopf: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023,
arXiv:2306.07280. Qiu et al.: Orthogonal Finetuning Made Scalable, 2025, arXiv:2506.19847.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Rotated
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.queries import wide
from rankwise.core.structured import BlockDiagonal
from rankwise.parameterizations.blocks import largest_divisor
from rankwise.parameterizations.cayley import BlockDropped, cayley, keep_blocks, misfit


@register("parameterization")
class OFT(Parameterization):
    """W' = W Dᵀ, or D W, with D block-diagonal and orthogonal.

    Args:
        site: the layer.
        block: b, the size of a block; divides the rotated dimension.
        cayley: "exact" or "neumann".
        terms: of the series.
        share_blocks: one rotation for all blocks.
        side: "input" or "output".
        constrain: bound on the norm of the skew matrices, over √k; None has none.
        dropout: probability of leaving out the rotation of a block.
    """

    facts = Facts(additive=False, exact_lora_export=False)
    sense: Tensor

    def __init__(
        self,
        site: Site,
        *,
        block: int = 32,
        cayley: str = "exact",
        terms: int = 5,
        share_blocks: bool = False,
        side: str = "input",
        constrain: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if cayley not in ("exact", "neumann") or side not in ("input", "output"):
            raise ArgumentError(f"cayley is exact or neumann, side input or output, not {cayley!r} and {side!r}")
        if terms < 1 or not 0.0 <= dropout < 1.0 or (constrain is not None and constrain <= 0):
            raise ArgumentError(f"terms >= 1, 0 <= dropout < 1 and constrain > 0, not {terms}, {dropout} and {constrain}")
        self.block, self.terms = block, terms if cayley == "neumann" else None
        self.constrain, self.dropout, self.thin = constrain, dropout, site.thin
        self.turns_output = side == "output" or site.layout.kind == "embedding"
        self.transposes = side == "input"
        self.count = _rotated(site, side) // block  # k
        self.skew = nn.Parameter(site.zeros(1 if share_blocks else self.count, block * (block - 1) // 2))  # (k or 1, b(b-1)/2)
        self.register_buffer("sense", site.zeros(1) + (1.0 if cayley == "exact" else -1.0))  # (1,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"skew"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        block, side = arguments.get("block", 32), arguments.get("side", "input")
        size = _rotated(site, side)
        if block >= 1 and size % block == 0:
            return []
        needs, has = f"a block that divides the {size} rotated coordinates", f"block is {block}"
        return misfit("oft", site, needs, has, f"use block={largest_divisor(min(block, size), size)}, or leave the layer out")

    def blocks(self) -> Tensor:
        """The rotations R (k, b, b)."""
        skew = wide(self.skew) * self.sense  # (k, b(b-1)/2)
        upper = skew.new_zeros(len(skew), self.block * self.block)
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=skew.device)
        upper = upper.index_copy(1, rows * self.block + columns, skew).view(-1, self.block, self.block)
        Q = upper - upper.mT  # (k, b, b)
        if self.constrain is not None:
            limit = self.constrain**2 / len(Q)
            square = Q.square().sum((1, 2), keepdim=True)  # (k, 1, 1)
            Q = torch.where(square > limit, Q * (limit / torch.where(square > limit, square, 1.0)).sqrt(), Q)
        return cayley(Q, terms=self.terms).expand(self.count, -1, -1)

    def rotation(self) -> Operator:
        """D: W' = W Dᵀ, or D W with side="output"."""
        return BlockDiagonal(self.blocks())

    def forward(self, base: Operator) -> Operator:
        blocks = self.blocks()
        if self.training and self.dropout and self.thin is not None:
            return BlockDropped(functools.partial(self._turned, base, blocks), self.count, self.dropout, self.thin)
        return self._turned(base, blocks, None)

    def _turned(self, base: Operator, blocks: Tensor, kept: Tensor | None) -> Operator:
        blocks = keep_blocks(blocks, kept)
        rotation = BlockDiagonal(blocks.mT if self.transposes else blocks)
        return Rotated(base, rotation, side="output" if self.turns_output else "input")


def _rotated(site: Site, side: str) -> int:
    """How many coordinates are rotated: the layer's inputs, or its outputs, or those of an embedding's vectors."""
    return site.m if side == "output" or site.layout.kind == "embedding" else site.n
