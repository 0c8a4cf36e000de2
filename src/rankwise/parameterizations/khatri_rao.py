"""LoKH: the update is a column-wise Khatri-Rao product of small factors, in general of full rank.

    W' = W + s · (F_1 ⊙ F_2 ⊙ … ⊙ F_q)          F_i (m_i, n) trained, m_1 … m_q = m; column k is f_1k ⊗ f_2k ⊗ … ⊗ f_qk

The first row index is the slowest: row i m_2 + j of F ⊙ G is F[i] ∘ G[j]. The last factor starts at zero, so W' = W; the
others are N(0, 1/m_i), which makes their columns unit vectors on average, so that a column of the update is as large as the
last factor's. Two zero factors would never move. Trained numbers n (m_1 + … + m_q), many more than LoRA's; rank up to
min(m, n). Not a LoRA pair and not LoKr, whose factors split columns as well.

(F ⊙ G) x = vec(F diag(x) Gᵀ) takes 2mn FLOPs per token, as many as the matrix does, so applying factor by factor gains
nothing. The matrix is made once per forward, mn multiplications, and joins the frozen weight before its one product with x; an
embedding multiplies the looked-up columns instead.

*Differs*: the paper has no experiments, and says neither how many factors nor where they start; two factors and this start are
ours (the later KRAdapter also starts one factor at zero).

Lu: Low-Rank Approximation, Adaptation, and Other Tales, 2024, arXiv:2408.05883.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.handwritten import RemadeLinear, Tensors, frozen_linear, sums_in_full
from rankwise.core.layouts import Layout
from rankwise.core.operators import Base, Operator, compute_dtype
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.parameterizations.even_factors import even_factors, has_factors


def khatri_rao(*factors: Tensor) -> Tensor:
    """F_1 ⊙ … ⊙ F_q (m_1 … m_q, n) of factors (m_i, n)."""
    return functools.reduce(lambda left, right: (left[:, None] * right[None]).flatten(0, 1), factors)


class _Made(RemadeLinear):
    """The matrix W + scale · F_1 ⊙ … ⊙ F_q, or the product alone where there is no W."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        first, rest = factors[0] * self.scale, khatri_rao(*factors[1:])
        if weight is None:
            return khatri_rao(first, rest), rest
        first, other = first.to(weight.dtype), rest.to(weight.dtype)
        blocks = weight.reshape(first.shape[0], *other.shape)  # (m_1, m / m_1, n)
        return torch.addcmul(blocks, first[:, None], other[None]).flatten(0, 1), rest

    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        first, *others = factors
        blocks = G.to(first.dtype).reshape(first.shape[0], -1, G.shape[1])  # (m_1, m / m_1, n)
        own = (blocks * made).sum(1) * self.scale
        below = (blocks.mul_(first[:, None]).sum(0)) * self.scale  # the gradient of F_2 ⊙ … ⊙ F_q
        if len(others) == 1:
            return own, below
        return own, *_Made(1.0).pull(below, khatri_rao(*others[1:]), None, *others)


class KhatriRao(Operator):
    """scale · F_1 ⊙ … ⊙ F_q."""

    def __init__(self, *factors: Tensor, scale: float = 1.0) -> None:
        self.factors, self.scale = factors, scale

    @property
    def shape(self) -> tuple[int, int]:
        m = 1
        for factor in self.factors:
            m *= factor.shape[0]
        return m, self.factors[0].shape[1]

    def dense(self) -> Tensor:
        return khatri_rao(self.factors[0] * self.scale, *self.factors[1:])

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.kind == "embedding":  # column k alone: its own factors' columns
            columns = [factor.t()[x] for factor in self.factors]  # (…, m_i)
            return functools.reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), columns) * self.scale
        if layout.kind != "linear":
            return super().apply(x, layout)
        x = x.to(compute_dtype(x, self.factors[0].dtype))
        return _Made(self.scale)(x, None, None, *self.factors)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        frozen = frozen_linear(base, x, layout, bias)
        if frozen is None or not sums_in_full(frozen[0]):
            return None
        x, weight, bias = frozen
        return _Made(self.scale)(x, weight, bias, *self.factors)


@register("parameterization")
class LoKH(Additive):
    """W' = W + alpha · (F_1 ⊙ … ⊙ F_q).

    Args:
        site: the layer.
        factors: q, two or more; m is split into factors as equal as possible, the smallest first, ones where it has too few.
        alpha: the scale s.
    """

    facts = Facts(exact_lora_export=False)

    def __init__(self, site: Site, *, factors: int = 2, alpha: float = 1.0) -> None:
        super().__init__()
        self.scale, self.count = alpha, factors
        for k, size in enumerate(even_factors(site.m, factors), start=1):
            shape = (size, site.n)  # (m_k, n)
            start = site.zeros(*shape) if k == factors else site.normal(*shape, std=size**-0.5, purpose=f"F_{k}")
            self.register_parameter(f"F_{k}", nn.Parameter(start))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        count = arguments.get("factors", 2)
        if count < 2:
            raise ArgumentError(f"factors is how many the update is a product of, at least 2, not {count}")
        return frozenset(f"F_{k}" for k in range(1, count + 1))

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        if has_factors(site.m):
            return []
        return [
            Problem(
                piece="lowrank_tales",
                needs="a number of outputs m that is a product of smaller numbers",
                has=f"m = {site.m} is not, so that one factor alone would be as large as the weight",
                remedy="leave the layer out with where=, or use loha, which needs no factors of m",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        return KhatriRao(*(getattr(self, f"F_{k}") for k in range(1, self.count + 1)), scale=self.scale)
