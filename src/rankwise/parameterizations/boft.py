"""BOFT: OFT with a product of permuted block rotations, so that small blocks mix all coordinates, and a gain per output.

    W' = diag(s) W Rᵀ,   R = F_{N-1} … F_1 F_0,   F_i = P_i diag(Q_{i,1}, …, Q_{i,D}) P_iᵀ          n = D b

`blocks` (N, D, b, b) are free matrices of which the skew part S = (M - Mᵀ)/2 counts, Q = (I - S)(I + S)⁻¹; `gain` s (m,).
They start at 0 and 1, so W' = W. P_i is the butterfly of level i: the coordinates fall into D/2ⁱ groups, and in a group
pieces of b/2 coordinates are reordered, even-numbered ones first; P_i[j, permutation[i, j]] = 1. With N = 1 there is no
permutation and R is OFT's D. N = 1 + log₂ D levels mix every coordinate with every other. A level costs two gathers and 2nb
FLOPs per token on x; neither R nor W' is formed (a convolution forms W'). The bias is not scaled. Trained numbers N D b² +
m, of which N n(b-1)/2 + m count. Not additive, full rank. Weight decay pulls s to 0: leave it out of the optimizer.

*Differs*: all N run in plain tensors (the library falls back to N = 1 without its extension). With dropout each block of
each level is replaced by I with probability dropout / N, independently; the release takes int(p D) blocks of one random
level.

Liu, Qiu, Feng, Xiu, Xue, Yu, Feng, Liu, Heo, Peng, Wen, Black, Weller, Schölkopf: Parameter-Efficient Orthogonal Finetuning
via Butterfly Factorization, 2023, arXiv:2311.06243.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Rotated, RowScale
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.queries import wide
from rankwise.core.structured import BlockDiagonal
from rankwise.parameterizations.cayley import BlockDropped, cayley, keep_blocks, misfit


class Butterfly(Operator):
    """The product of P diag(blocks_i) Pᵀ over levels, the last one leftmost; blocks (N, D, b, b), P[j, permutation[i, j]] = 1.

    `inverse` holds the inverse permutations; `order` lists the levels from right to left, as they meet an input.
    """

    def __init__(self, blocks: Tensor, permutation: Tensor, inverse: Tensor, order: range) -> None:
        self.blocks, self.permutation, self.inverse, self.order = blocks, permutation, inverse, order

    @property
    def shape(self) -> tuple[int, int]:
        n = self.permutation.shape[1]
        return n, n

    def dense(self) -> Tensor:
        n = self.permutation.shape[1]
        identity = torch.eye(n, dtype=self.blocks.dtype, device=self.blocks.device)
        return self.apply(identity, LinearLayout()).t()

    def transposed(self) -> Butterfly:
        return Butterfly(self.blocks.mT, self.permutation, self.inverse, self.order[::-1])

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        if len(self.order) == 1:  # one level has no permutation
            return BlockDiagonal(self.blocks[0]).apply(x, layout)
        for level in self.order:  # Pᵀ x gathers by the inverse permutation, P z by the permutation
            z = BlockDiagonal(self.blocks[level]).apply(x.index_select(-1, self.inverse[level]), layout)
            x = z.index_select(-1, self.permutation[level])
        return x


@register("parameterization")
class BOFT(Parameterization):
    """W' = diag(s) W Rᵀ, R a product of N butterfly levels.

    Args:
        site: the layer.
        block: b, the size of a block.
        factors: N, the number of levels.
        dropout: probability of leaving out the rotation of a block, over N.
    """

    facts = Facts(additive=False, exact_lora_export=False, layouts=frozenset({"linear", "conv"}))
    permutation: Tensor
    inverse: Tensor

    def __init__(self, site: Site, *, block: int = 4, factors: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.dropout, self.thin = dropout, site.thin
        self.blocks = nn.Parameter(site.zeros(factors, site.n // block, block, block))  # (N, D, b, b)
        self.gain = nn.Parameter(site.zeros(site.m) + 1)  # (m,)
        levels = [butterfly(site.n, block, level if factors > 1 else None) for level in range(factors)]
        permutation = torch.stack(levels).to(site.device)  # (N, n)
        self.register_buffer("permutation", permutation, persistent=False)  # they follow from n, b and N
        self.register_buffer("inverse", permutation.argsort(1), persistent=False)  # (N, n)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"blocks", "gain"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        block, factors, n = arguments.get("block", 4), arguments.get("factors", 1), site.n
        fitting = [size for size in range(1, n + 1) if _fits(n, size, max(1, factors))]
        if factors >= 1 and block in fitting:
            return []
        needs = "a block that divides n" if factors == 1 else "an even block, and n a multiple of block · 2^(factors - 1)"
        options = f"use block={max(fitting)} or another of {fitting[:6]}" if fitting else "use fewer factors"
        has = f"block {block} and factors {factors} for n = {n}"
        return misfit("boft", site, f"factors >= 1, and {needs}", has, f"{options}, or leave the layer out with where=")

    def rotation(self) -> Operator:
        """R (n, n): W' = diag(s) W Rᵀ."""
        return self._rotation(None)

    def _rotation(self, kept: Tensor | None) -> Butterfly:
        levels, count, b, _ = self.blocks.shape
        skew = (wide(self.blocks) - wide(self.blocks).mT) / 2
        turned = cayley(skew.flatten(0, 1)).view(levels, count, b, b)
        kept = None if kept is None else kept.view(levels, count)
        return Butterfly(keep_blocks(turned, kept), self.permutation, self.inverse, range(levels))

    def forward(self, base: Operator) -> Operator:
        if self.training and self.dropout and self.thin is not None:
            levels, count = self.blocks.shape[:2]
            build = functools.partial(self._adapted, base)
            return BlockDropped(build, levels * count, self.dropout / levels, self.thin)
        return self._adapted(base, None)

    def _adapted(self, base: Operator, kept: Tensor | None) -> Operator:
        return RowScale(Rotated(base, self._rotation(kept).transposed(), side="input"), self.gain)


def butterfly(n: int, block: int, level: int | None) -> Tensor:
    """The permutation (n,) of a level; None is the identity of a single level."""
    if level is None:
        return torch.arange(n)
    group = block * 2**level  # n over D / 2^level
    pieces = torch.arange(group).view(-1, block // 2)
    order = torch.cat([pieces[0::2], pieces[1::2]]).flatten()  # (group,)
    return (torch.arange(0, n, group)[:, None] + order).flatten()


def _fits(n: int, block: int, factors: int) -> bool:
    return n % block == 0 if factors == 1 else block % 2 == 0 and n % (block * 2 ** (factors - 1)) == 0
