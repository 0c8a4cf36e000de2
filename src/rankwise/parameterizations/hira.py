"""HiRA: the weight is multiplied, entry by entry, with a low-rank matrix, so that the update inherits the rank of the weight.

    W' = W ∘ (1 + B A),   the update is W ∘ (B A)          B (m, r), A (r, n), both trained; there is no alpha

B starts at zero and A kaiming-uniform U(±1/√n), so W' = W; for an embedding A is zero and B Gaussian, since its columns are
looked up one by one. A zero of W stays zero. With r = 1 the update is diag(b) W diag(a), of the rank of W. Not additive: W
is read in every forward, and an adapter belongs to one base. Of full rank in general, so it exports as LoRA only by
truncation. Learning rates are larger than LoRA's, since entries of W are small. Trained numbers r(m + n).

A frozen linear layer makes M = W ∘ (1 + B A) once, 2mnr FLOPs, and applies it instead of W; backward makes M again, so no
(m, n) matrix is kept. For r matrix products with W in place of B A no more than one token would pay. In half precision W x
and the update stay apart, since a small update would be rounded away in the sum.

*Differs*: the release's second scale is left out (it is one by default).

Huang et al.: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR 2025.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.handwritten import RemadeLinear, Tensors, frozen_linear, sums_in_full
from rankwise.core.layouts import Layout
from rankwise.core.operators import Base, LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register


class _Linear(RemadeLinear):
    """M = W ∘ (1 + B A), or W ∘ (B A) where the frozen layer runs beside it."""

    def __init__(self, *, merged: bool) -> None:
        self.merged = merged

    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        assert weight is not None
        B, A = (factor.to(weight.dtype) for factor in factors)
        product = B @ A  # (m, n)
        return torch.addcmul(weight, weight, product) if self.merged else weight * product, None

    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        assert weight is not None
        B, A = (factor.to(G.dtype) for factor in factors)
        G.mul_(weight)
        return G @ A.t(), B.t() @ G


class Modulated(Operator):
    """base ∘ (1 + B A)."""

    def __init__(self, base: Operator, B: Tensor, A: Tensor) -> None:
        self.base, self.B, self.A = base, B, A

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def dense(self) -> Tensor:
        weight = self.base.dense()
        return torch.addcmul(weight, weight, (self.B @ self.A).to(weight.dtype))

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if layout.kind == "embedding":  # the looked-up row is multiplied, without its table
            y = self.base.affine(x, layout, bias)
            return torch.addcmul(y, y, LowRank(self.B, self.A).apply(x, layout).to(y.dtype))
        frozen = frozen_linear(self.base, x, layout, bias) if isinstance(self.base, Base) else None
        if frozen is not None and sums_in_full(frozen[0]):
            return _Linear(merged=True)(*frozen, self.B, self.A)
        y = self.base.affine(x, layout, bias)
        if frozen is not None:
            return y + _Linear(merged=False)(*frozen[:2], None, self.B, self.A)
        weight = self.base.dense()
        product = (self.B @ self.A).to(y.dtype)  # (m, n)
        return y + layout.matrix(x.to(y.dtype), weight.to(y.dtype) * product)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self.affine(x, layout, None)


@register("parameterization")
class HiRA(Parameterization):
    """W' = W ∘ (1 + B A).

    Args:
        site: the layer.
        rank: r.
    """

    facts = Facts(additive=False, exact_lora_export=False)

    def __init__(self, site: Site, *, rank: int = 32) -> None:
        super().__init__()
        self.rank = rank
        B, A = self._draw(site)
        self.B, self.A = nn.Parameter(B), nn.Parameter(A)  # (m, r), (r, n)

    def _draw(self, site: Site) -> tuple[Tensor, Tensor]:
        if site.layout.kind == "embedding":
            return site.normal(site.m, self.rank), site.zeros(self.rank, site.n)
        return site.zeros(site.m, self.rank), site.uniform(self.rank, site.n, bound=1 / math.sqrt(site.n))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B"})

    def forward(self, base: Operator) -> Operator:
        return Modulated(base, self.B, self.A)
