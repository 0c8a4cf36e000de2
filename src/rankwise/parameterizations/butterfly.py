"""Products of permuted block-diagonal matrices, as BOFT has them, and their permutations."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Operator
from rankwise.core.structured import BlockDiagonal


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

    def grouped(self, size: int) -> BlockDiagonal:
        """The product itself, where it is block-diagonal with blocks of this size."""
        n = self.permutation.shape[1]
        columns = torch.eye(size, dtype=self.blocks.dtype, device=self.blocks.device).repeat(1, n // size)  # (size, n)
        turned = self.apply(columns, LinearLayout()).view(size, n // size, size)
        return BlockDiagonal(turned.permute(1, 2, 0))

    def transposed(self) -> Butterfly:
        return Butterfly(self.blocks.mT, self.permutation, self.inverse, self.order[::-1])

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        for level in self.order:  # Pᵀ x gathers by the inverse permutation, P z by the permutation
            z = BlockDiagonal(self.blocks[level]).apply(x.index_select(-1, self.inverse[level]), layout)
            x = z.index_select(-1, self.permutation[level])
        return x


def butterfly(n: int, block: int, level: int | None) -> Tensor:
    """The permutation (n,) of a level; None is the identity of a single level."""
    if level is None:
        return torch.arange(n)
    group = block * 2**level  # n over D / 2^level
    pieces = torch.arange(group).view(-1, block // 2)
    order = torch.cat([pieces[0::2], pieces[1::2]]).flatten()  # (group,)
    return (torch.arange(0, n, group)[:, None] + order).flatten()
