"""The operator of SODA's rotation: a matrix behind a Kronecker product of three small ones, applied factor by factor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Operator, compute_dtype
from rankwise.parameterizations.frame import Composed, Whole

_JOINED = 64  # two small factors become one of at most this size: more FLOPs, in half the time
RELEASED = {640: (8, 8, 10), 768: (6, 8, 16), 1280: (4, 16, 20), 2048: (4, 8, 64)}


class TurnedInput(Operator):
    """inner · (Q_1 ⊗ Q_2 ⊗ Q_3)ᵀ, factor by factor.

    The rotation meets the tokens, or the m rows of the matrix where `inner` makes its matrix anyway.
    """

    def __init__(self, inner: Composed, rotations: Sequence[Tensor]) -> None:
        self.inner, self.rotations = inner, rotations

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        rows = self.inner.dense()  # row i of W' is Q w_i
        return mode_products(rows, self.rotations, torch.promote_types(rows.dtype, self.rotations[0].dtype))

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if self._on_the_matrix(x, layout):
            return Whole(self.dense()).apply(x, layout)
        return self.inner.apply(self._turned(x), layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if self._on_the_matrix(x, layout):
            return Whole(self.dense()).affine(x, layout, bias)
        return self.inner.affine(self._turned(x), layout, bias)

    def _on_the_matrix(self, x: Tensor, layout: Layout) -> bool:
        return not isinstance(layout, LinearLayout) or self.inner.whole_is_less_work(x, layout)

    def _turned(self, x: Tensor) -> Tensor:
        """Qᵀ x (…, n)."""
        return mode_products(x, [Q.t() for Q in self.rotations], compute_dtype(x, x.dtype))


def mode_products(x: Tensor, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(F_1 ⊗ F_2 ⊗ F_3) x for every row x of (…, n)."""
    first, second, third = factors
    if first.shape[0] * second.shape[0] <= _JOINED:
        left, right = torch.kron(first, second).to(dtype), third.to(dtype)
        grid = x.to(dtype).reshape(-1, left.shape[1], right.shape[1])  # (T, n_1 n_2, n_3)
        return (left @ (grid @ right.t())).reshape(x.shape)
    first, second, third = first.to(dtype), second.to(dtype), third.to(dtype)
    grid = x.to(dtype).reshape(-1, first.shape[1], second.shape[1], third.shape[1])  # (T, n_1, n_2, n_3)
    grid = second @ (grid @ third.t())
    return (first @ grid.flatten(2)).reshape(x.shape)


def split_in_three(size: int) -> tuple[int, int, int]:
    """Three ascending factors of `size`: the released ones for its layers, else those with the least sum of squares."""
    if size in RELEASED:
        return RELEASED[size]
    small = [a for a in range(1, round(size ** (1 / 3)) + 1) if size % a == 0]
    triples = [(a, b, size // a // b) for a in small for b in range(a, math.isqrt(size // a) + 1) if size // a % b == 0]
    return min(triples, key=lambda triple: sum(factor**2 for factor in triple))


def completed(factors: Sequence[int], size: int) -> tuple[int, ...]:
    """The factors with -1 replaced by what is left of `size`."""
    rest = size // max(1, math.prod(factor for factor in factors if factor != -1))
    return tuple(rest if factor == -1 else factor for factor in factors)
