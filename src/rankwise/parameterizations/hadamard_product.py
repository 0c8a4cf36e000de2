"""The operator s · (B₁ A₁) ∘ (B₂ A₂), applied in factored form or as a matrix, and its gradient without (m, n) intermediates.

Factored: row-wise and column-wise products of the factors are a pair of rank r², applied like LoRA. As a matrix: it is added
to the frozen weight before the one product with x, so that only its making and the gradient G = g xᵀ are extra.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rankwise.core.handwritten import Handwritten, RemadeLinear, Tensors, frozen_linear, sums_in_full
from rankwise.core.layouts import Layout
from rankwise.core.operators import Base, LowRank, Operator, compute_dtype
from rankwise.core.queries import narrow_form


def _pull(G: Tensor, first: Tensor, second: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> Tensors:
    """Gradients of the factors from that of (B₁ A₁) ∘ (B₂ A₂), whose factors are `first` and `second` (overwritten)."""
    second.mul_(G)  # dL/d(B₁ A₁)
    first.mul_(G)  # dL/d(B₂ A₂)
    return second @ A1.t(), B1.t() @ second, first @ A2.t(), B2.t() @ first


class _Product(Handwritten):
    """(B₁, A₁, B₂, A₂) -> scale · (B₁ A₁) ∘ (B₂ A₂), keeping the factors alone."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def plain(self, *tensors: Any) -> Tensor:
        B1, A1, B2, A2 = tensors
        return (B1 @ A1) * (B2 @ A2) * self.scale

    def value(self, *tensors: Any) -> Tensor:
        B1, A1, B2, A2 = tensors
        return (B1 @ A1).mul_(B2 @ A2).mul_(self.scale)

    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        B1, A1, B2, A2 = tensors
        return _pull(gradient * self.scale, B1 @ A1, B2 @ A2, *tensors)


class _Linear(RemadeLinear):
    """M = W + scale · (B₁ A₁) ∘ (B₂ A₂), or the product alone where there is no W."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        like = factors[0] if weight is None else weight
        B1, A1, B2, A2 = (factor.to(like.dtype) for factor in factors)
        first, second = B1 @ A1, B2 @ A2  # (m, n)
        if weight is None:
            return first * second * self.scale, (first, second)
        return torch.addcmul(weight, first, second, value=self.scale), (first, second)

    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        first, second = made
        G = G.to(first.dtype)
        return _pull(G if self.scale == 1.0 else G.mul_(self.scale), first, second, *(f.to(first.dtype) for f in factors))


class HadamardProduct(Operator):
    """scale · (B₁ A₁) ∘ (B₂ A₂)."""

    def __init__(self, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float = 1.0) -> None:
        self.B1, self.A1, self.B2, self.A2, self.scale = B1, A1, B2, A2, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.B1.shape[0], self.A1.shape[1]

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.B1, self.A1, self.B2, self.A2

    def dense(self) -> Tensor:
        return _Product(self.scale)(*self._tensors)

    def factored(self) -> LowRank:
        """The exact pair of rank r²: rows of B₁ times rows of B₂ (m, r²), columns of A₁ times columns of A₂ (r², n)."""
        B = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)
        A = (self.A1[:, None, :] * self.A2[None, :, :]).flatten(0, 1)
        return LowRank(B, A, self.scale)

    def prefers_factors(self, tokens: int, *, merged: bool) -> bool:
        """Whether the pair of rank r² takes fewer operations than the matrix: forward alone, or backward too with gradients.

        Forward is 2Tr²(m + n) against making the matrix, 4mnr, and, where it is not merged into the frozen weight, applying
        it, 2Tmn. Backward is twice the former against making it again, its four products, 12mnr, and G, 2Tmn.
        """
        (m, n), r, trained = self.shape, self.B1.shape[1], torch.is_grad_enabled()
        factored = (6 if trained else 2) * tokens * r * r * (m + n)
        matrix = (16 if trained else 4) * m * n * r
        products = trained + (0 if merged else 2 if trained else 1)  # of T tokens with (m, n)
        return factored < matrix + 2 * tokens * m * n * products

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        dtype = compute_dtype(x, self.B1.dtype)
        if layout.kind == "embedding":
            return LowRank(self.B1, self.A1).apply(x, layout) * LowRank(self.B2, self.A2, self.scale).apply(x, layout)
        if layout.kind == "linear":
            if self.prefers_factors(math.prod(x.shape[:-1]), merged=False):
                return self.factored().apply(x, layout)
            return _Linear(self.scale)(x.to(dtype), None, None, *self._tensors).to(dtype)
        m, n = self.shape
        return self.factored().apply(x, layout) if self.B1.shape[1] ** 2 * (m + n) < m * n else super().apply(x, layout)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        frozen = frozen_linear(base, x, layout, bias)
        if frozen is None:
            return None
        merged = sums_in_full(frozen[0])
        if self.prefers_factors(math.prod(x.shape[:-1]), merged=merged):
            return self.factored().add_to_base(base, x, layout, bias)
        return _Linear(self.scale)(*frozen, *self._tensors) if merged else None


@narrow_form(HadamardProduct)
def _(operator: HadamardProduct) -> LowRank | None:
    return operator.factored()
