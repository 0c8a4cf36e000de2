"""The one idea of rankwise: a structured matrix. An `Operator` is an immutable linear map of shape (m, n).

Every operator has two views of the same numbers:

    dense()            the matrix itself, (m, n), differentiable: the reference
    apply(x, layout)   its action on a layer's input: the fast path

and `affine` adds the layer's bias, so that the frozen layer can keep it inside its own kernel. Operators hold references to
tensors and compute nothing when they are made, so that a new one can be built in every forward.

This file has the leaves: `Dense`, `Base` (the frozen layer), `LowRank` and `Chain`. `combinators.py` and `structured.py`
have the rest; questions about operators (`row_norms`, `as_low_rank`, `svd`, …) are functions in `queries.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rankwise.core.fused import can_fuse, low_rank_linear
from rankwise.core.layouts import Layout, LinearLayout


def compute_dtype(x: Tensor, default: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the input's, or autocast's; `default` for token numbers."""
    if not x.is_floating_point():
        return default
    if x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Operator(ABC):
    """Interface: a linear map of shape (m, n)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n) = (outputs, inputs)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix (m, n), differentiable in every tensor it is made of."""

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        """The linear part of the layer, without bias. Default: the layout applies `dense()`."""
        matrix = self.dense()
        return layout.matrix(x, matrix.to(compute_dtype(x, matrix.dtype)))

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        """The layer's whole output: `apply` plus bias (m,)."""
        y = self.apply(x, layout)
        return y if bias is None else layout.add_bias(y, bias.to(y.dtype))

    def add_to(self, y: Tensor, x: Tensor, layout: Layout) -> Tensor:
        """Y + apply(x). May be faster than the two apart; does not write into y."""
        return y + self.apply(x, layout).to(y.dtype)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        """The frozen layer's whole output plus this update, x -> W x + b + apply(x), where one go is faster; else None."""
        return None

    def __repr__(self) -> str:
        m, n = self.shape
        return f"{type(self).__name__}({m}, {n})"


class Dense(Operator):
    """A plain matrix (m, n)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.matrix.shape
        return m, n

    def dense(self) -> Tensor:
        return self.matrix


class Base(Operator):
    """The frozen layer itself. Acts through the layer's own forward, so a quantized layer stays quantized.

    Args:
        layer: the module.
        layout: its layout.
        forward: the module's own forward, x -> W x + b, free of any adapter.
        weight: gives the weight as a matrix (m, n); dequantizes where the layer is quantized.
        shape: (m, n).
    """

    def __init__(
        self,
        layer: nn.Module,
        layout: Layout,
        forward: Callable[[Tensor], Tensor],
        weight: Callable[[], Tensor],
        shape: tuple[int, int],
    ) -> None:
        self.layer, self.layout, self.forward, self.weight, self._shape = layer, layout, forward, weight, shape

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def plain_weight(self) -> Tensor | None:
        """The layer's weight tensor where it is an ordinary one, None where it is quantized or computed."""
        weight = self.layer._parameters.get("weight")
        if weight is None or type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return None
        return weight

    def dense(self) -> Tensor:
        return self.weight()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        weight = self.plain_weight()
        if weight is not None:
            return layout.matrix(x, layout.to_matrix(weight))
        y, bias = self.forward(x), getattr(self.layer, "bias", None)
        return y if bias is None else layout.add_bias(y, -bias.to(y.dtype))

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if bias is getattr(self.layer, "bias", None):
            return self.forward(x)
        return super().affine(x, layout, bias)  # a method that changes the bias


class LowRank(Operator):
    """scale · B A, with B (m, r), A (r, n)."""

    def __init__(self, B: Tensor, A: Tensor, scale: float = 1.0) -> None:
        self.B, self.A, self.scale = B, A, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """r, the inner width."""
        return self.A.shape[0]

    def folded(self) -> LowRank:
        """The same operator with scale 1 (the scale multiplied into B)."""
        return self if self.scale == 1.0 else LowRank(self.B * self.scale, self.A)

    def dense(self) -> Tensor:
        return (self.B @ self.A) * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        dtype = compute_dtype(x, self.A.dtype)
        z = layout.project(x, self.A.to(dtype))
        return layout.expand(z if self.scale == 1.0 else z * self.scale, self.B.to(dtype))

    def add_to(self, y: Tensor, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().add_to(y, x, layout)
        dtype = y.dtype
        z = layout.project(x.to(dtype), self.A.to(dtype))
        flat, small = y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])
        return torch.addmm(flat, small, self.B.to(dtype).t(), alpha=self.scale).reshape(y.shape)

    def add_to_base(
        self,
        base: Base,
        x: Tensor,
        layout: Layout,
        bias: Tensor | None,
        thinned: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor | None:
        """Base and update in one kernel, x -> gain ∘ (W x + scale · B A x̃) + bias; None where that is not allowed.

        `thinned` is x̃, the input of the update under dropout; None means x.
        """
        weight = base.plain_weight()
        if weight is None or not isinstance(layout, LinearLayout) or not can_fuse(x, weight, bias):
            return None
        dtype = compute_dtype(x, x.dtype)
        x, weight = x.to(dtype), layout.to_matrix(weight).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        gain = None if gain is None else gain.to(dtype)
        thinned = None if thinned is None else thinned.to(dtype)
        return low_rank_linear(x, weight, bias, self.B, self.A, self.scale, thinned, gain)


class Chain(Operator):
    """A product of small factors F₁ F₂ … F_k times a scale; a 1-D factor is a diagonal.

    Factors may be free, frozen, or slices of a shared bank. About two thirds of all published parameterizations are a chain.
    The last 2-D factor is applied by the layer's geometry (a convolution keeps its kernel there), the rest pointwise.
    """

    def __init__(self, *factors: Tensor, scale: float = 1.0) -> None:
        self.factors, self.scale = factors, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape[0], self.factors[-1].shape[-1]

    def dense(self) -> Tensor:
        product = self.factors[0] if self.factors[0].dim() == 2 else torch.diag(self.factors[0])
        for factor in self.factors[1:]:
            product = product * factor if factor.dim() == 1 else product @ factor
        return product * self.scale

    def narrowest(self) -> LowRank:
        """The exact pair (B, A) at the narrowest inner width."""
        widths = [factor.shape[0] for factor in self.factors[1:]]
        cut = widths.index(min(widths)) + 1
        return LowRank(_product(self.factors[:cut]), _product(self.factors[cut:]), self.scale)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if self.factors[-1].dim() == 1:  # a diagonal on the inputs has no channels to project into
            return super().apply(x, layout)
        dtype = compute_dtype(x, self.factors[-1].dtype)
        factors = [factor.to(dtype) for factor in self.factors]
        z = layout.project(x, factors[-1])
        if self.scale != 1.0:
            z = z * self.scale
        last_full = next(i for i, factor in enumerate(factors) if factor.dim() == 2)
        if last_full == len(factors) - 1:  # only diagonals to the left of one full factor
            return super().apply(x, layout)
        for factor in reversed(factors[last_full + 1 : -1]):
            z = layout.mix(z, factor)
        y = layout.expand(z, factors[last_full])
        for factor in reversed(factors[:last_full]):
            y = layout.scale_output(y, factor)
        return y


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    """The product of a run of factors, 1-D ones as diagonals, as a matrix."""
    product = factors[-1] if factors[-1].dim() == 2 else torch.diag(factors[-1])
    for factor in reversed(factors[:-1]):
        product = factor[:, None] * product if factor.dim() == 1 else factor @ product
    return product
