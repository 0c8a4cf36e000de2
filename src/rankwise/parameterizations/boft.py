"""BOFT: OFT with a product of permuted block rotations, so that small blocks mix all coordinates, and a gain per output.

    W' = diag(s) W Rᵀ,   R = F_{N-1} … F_1 F_0,   F_i = P_i diag(Q_{i,1}, …, Q_{i,D}) P_iᵀ          n = D b

`blocks` (N, D, b, b) are free matrices of which the skew part S = (M - Mᵀ)/2 counts, Q = (I - S)(I + S)⁻¹; `gain` s (m,).
They start at 0 and 1, so W' = W. P_i is the butterfly of level i: the coordinates fall into D/2ⁱ groups, and in a group
pieces of b/2 coordinates are reordered, even-numbered ones first; P_i[j, permutation[i, j]] = 1. With N = 1 there is no
permutation and R is OFT's D. N = 1 + log₂ D levels mix every coordinate with every other. The levels act on x: while b
2^(N-1) is small they are first multiplied out, to blocks of that size, else each costs two gathers and 2nb FLOPs per token;
neither a dense R nor W' is formed (a convolution forms W'). The bias is not scaled. Trained numbers N D b² + m, of which N
n(b-1)/2 + m count. Not additive, full rank. Weight decay pulls s to 0: leave it out of the optimizer.

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
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.queries import full_precision, wide
from rankwise.core.structured import BlockDiagonal
from rankwise.parameterizations.butterfly import Butterfly, butterfly
from rankwise.parameterizations.cayley import BlockDropped, cayley, keep_blocks, misfit

WIDEST = 64  # levels are multiplied out while their product has blocks of at most this size: one pass over the inputs


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
        nearest = max((size for size in fitting if size <= block), default=None) or min(fitting, default=None)
        options = f"use block={nearest} (or one of {fitting[:6]})" if fitting else "use fewer factors"
        has = f"block {block} and factors {factors} for n = {n}"
        return misfit("boft", site, f"factors >= 1, and {needs}", has, f"{options}, or leave the layer out with where=")

    def rotation(self) -> Operator:
        """R (n, n): W' = diag(s) W Rᵀ."""
        return self._rotation(None)

    def _rotation(self, kept: Tensor | None) -> Operator:
        levels, count, b, _ = self.blocks.shape
        skew = (wide(self.blocks) - wide(self.blocks).mT) / 2
        turned = cayley(skew.flatten(0, 1)).view(levels, count, b, b)
        turned = keep_blocks(turned, None if kept is None else kept.view(levels, count))
        if levels == 1:
            return BlockDiagonal(turned[0])
        product = Butterfly(turned, self.permutation, self.inverse, range(levels))
        group = b * 2 ** (levels - 1)  # all levels stay inside groups of this size
        if group > WIDEST:
            return product
        with full_precision():
            return product.grouped(group)

    def forward(self, base: Operator) -> Operator:
        if self.training and self.dropout and self.thin is not None:
            levels, count = self.blocks.shape[:2]
            build = functools.partial(self._adapted, base)
            return BlockDropped(build, levels * count, self.dropout / levels, self.thin)
        return self._adapted(base, None)

    def _adapted(self, base: Operator, kept: Tensor | None) -> Operator:
        return RowScale(Rotated(base, self._rotation(kept).transposed(), side="input"), self.gain)


def _fits(n: int, block: int, factors: int) -> bool:
    return n % block == 0 if factors == 1 else block % 2 == 0 and n % (block * 2 ** (factors - 1)) == 0
