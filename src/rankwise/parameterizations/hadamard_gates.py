"""Fast LoRA (batched low-rank adaptation): the weight is multiplied, entry by entry, by a low-rank matrix.

    W' = W ∘ (B A),   y = Σ_k B_k ∘ (W (A_k ∘ x))          B (m, r), A (r, n); k = 1 … r

Each of the r terms scales the inputs, runs the frozen layer and scales the outputs, so that every row of a batch can have
its own adapter: rows only differ in their gates, and the products with W are dense ones over the whole batch, gathered
nowhere (`rankwise.activate_(model, [name per row])`). The frozen layer may stay quantized. B A starts as the matrix of ones:
B_1 = 1 and A_1 = 1, further columns of B small and random and rows of A zero, so W' = W. Trained numbers r(m + n), extra
FLOPs 2mn(r - 1) per token: nothing for r = 1, which is a gain per input and per output; r > 1 is dear. `mode="residual"`
adds instead, W' = W + s W ∘ (B A), from B = 0 and with s = α / r: 2mnr FLOPs. Not additive, since a product of W, with no
exact LoRA: the rank of W ∘ (B A) reaches r times W's. A zero of W stays zero. B A should decay to ones, not zeros: use no
weight decay. A convolution forms W'; an embedding looks up both factors.

Not LoRA, whose sum has no such form: there a batch takes two batched products per layer.

*Differs*: the paper does not say how to start; the start at ones is ours.

Wen, Chaudhuri: Batched Low-Rank Adaptation of Foundation Models, 2023, arXiv:2312.05677.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import row_pass
from rankwise.core.errors import ArgumentError
from rankwise.core.layouts import EmbeddingLayout, Layout, LinearLayout
from rankwise.core.operators import Base, LowRank, Operator, compute_dtype
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.routing import gathered
from rankwise.parameterizations.scaling import scale_of


class Gates(Operator):
    """inner ∘ (B A), plus inner itself with `residual`."""

    def __init__(self, inner: Operator, B: Tensor, A: Tensor, *, residual: bool) -> None:
        self.inner, self.B, self.A, self.residual = inner, B, A, residual

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        inner, gates = self.inner.dense(), self.B @ self.A
        return inner * (gates + 1) if self.residual else inner * gates

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if isinstance(layout, EmbeddingLayout):  # the column of a token meets the same token's gates
            y = self.inner.apply(x, layout)
            gates = LowRank(self.B, self.A).apply(x, layout).to(y.dtype)
            return y * (gates + 1) if self.residual else y * gates
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        return run_gates(self.inner, x, layout, list(self.B.t()), list(self.A), self.residual)


def run_gates(
    inner: Operator, x: Tensor, layout: Layout, outer: Sequence[Tensor], inputs: Sequence[Tensor], residual: bool
) -> Tensor:
    """Σ_k B_k ∘ (W (A_k ∘ x)), term by term to save memory; the gates (m,) and (n,), or (batch, 1…, m) and (batch, 1…, n)."""
    dtype = compute_dtype(x, x.dtype)
    y = inner.apply(x, layout) if residual else None
    for B, A in zip(outer, inputs, strict=True):
        term, gate = inner.apply(x * A.to(dtype), layout), B.to(dtype)
        y = term * gate if y is None else torch.addcmul(y, term, gate)
    assert y is not None
    return y


@row_pass(Gates)
def _(parts: Sequence[Operator], rows: Tensor, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    gated = [part for part in parts if isinstance(part, Gates)]
    first = gated[0]
    same = all(isinstance(part.inner, Base) and part.residual == first.residual for part in gated)
    if not same or not isinstance(layout, LinearLayout) or not all(isinstance(part, Gates | Base) for part in parts):
        return None
    width = max(len(part.A) for part in gated)
    outer = [_padded(part.B.t() if isinstance(part, Gates) else None, width, first, first.B[:, 0]) for part in parts]
    inputs = [_padded(part.A if isinstance(part, Gates) else None, width, first, first.A[0]) for part in parts]
    B = [gathered([gates[k] for gates in outer], rows, x) for k in range(width)]
    A = [gathered([gates[k] for gates in inputs], rows, x) for k in range(width)]
    y = run_gates(first.inner, x, layout, B, A, first.residual)
    return y if bias is None else layout.add_bias(y, bias.to(y.dtype))


def _padded(gates: Tensor | None, width: int, like: Gates, vector: Tensor) -> Tensor:
    """(width, k): gates with zeros below; the frozen layer's are ones in the first place, or none under `residual`."""
    own = vector.new_zeros(0, len(vector)) if gates is None else gates
    if gates is None and not like.residual:
        own = vector.new_ones(1, len(vector))
    return torch.cat([own, vector.new_zeros(width - len(own), len(vector))])


@register("parameterization")
class HadamardGates(Parameterization):
    """W' = W ∘ (B A), or W + s W ∘ (B A).

    Args:
        site: the layer.
        rank: r.
        mode: "replace" or "residual".
        alpha: numerator of s, with "residual"; None means r.
    """

    facts = Facts(additive=False, exact_lora_export=False)

    def __init__(self, site: Site, *, rank: int = 1, mode: str = "replace", alpha: float | None = None) -> None:
        super().__init__()
        self.rank, self.residual, self.scale = rank, mode == "residual", scale_of("lora", alpha, rank)
        A = site.uniform(rank, site.n, bound=1.0 / math.sqrt(site.n), purpose="A")  # (r, n)
        B = site.normal(site.m, rank, std=0.02, purpose="B")  # (m, r)
        if self.residual:
            B.zero_()
        else:
            A.zero_()
            A[0], B[:, 0] = 1.0, 1.0
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @classmethod
    def prunable(cls, **arguments: Any) -> bool:
        return arguments.get("mode", "replace") == "residual"

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        mode = arguments.get("mode", "replace")
        if mode not in ("replace", "residual"):
            raise ArgumentError(f"mode is replace or residual, not {mode!r}")
        if mode == "replace" and arguments.get("alpha") is not None:
            raise ArgumentError("with mode='replace' nothing is scaled, so alpha would have no effect; leave it out")
        return frozenset({"A", "B"})

    def forward(self, base: Operator) -> Operator:
        return Gates(base, self.B * self.scale if self.residual else self.B, self.A, residual=self.residual)
