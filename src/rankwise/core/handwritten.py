"""Functions whose gradient is written by hand, so that large intermediates are made again in backward instead of kept.

`Handwritten` is such a function of tensors. Its plain form is what torch.compile, torch.func and second derivatives use; it is
also the reference. `RemadeLinear` is the commonest case, a linear layer whose matrix is a function of small factors:

    y = M x + b,   M = update(W, factors)   or   W + update(W, factors)

It keeps x and the factors. Backward makes M again for dx = Mᵀ g, and one product G = g xᵀ (m, n), from which the method takes
the gradients of its factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.fused import can_fuse
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Base, compute_dtype
from rankwise.core.transforms import transformed

Tensors = tuple[Tensor | None, ...]


class Handwritten(ABC):
    """Interface: a differentiable function of tensors, with a plain form and a gradient by hand."""

    @abstractmethod
    def plain(self, *tensors: Any) -> Tensor:
        """The value in ordinary torch."""

    def value(self, *tensors: Any) -> Tensor:
        """The value where nothing is recorded; may be faster than `plain`."""
        return self.plain(*tensors)

    def value_and_kept(self, needs: tuple[bool, ...], *tensors: Any) -> tuple[Tensor, Tensors]:
        """The value and further tensors that `gradients` is given after the others; by default none."""
        return self.value(*tensors), ()

    @abstractmethod
    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        """The gradients of the tensors, None where not needed. Nothing is recorded."""

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """The value, by the short way where that gives what plain autograd gives."""
        if torch.compiler.is_compiling() or transformed():
            return self.plain(*tensors)
        return _Node.apply(self, *tensors)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Handwritten, *tensors: Tensor | None) -> Tensor:
        value, kept = function.value_and_kept(ctx.needs_input_grad[1:], *tensors)
        ctx.function, ctx.count = function, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *ctx.function.gradients(gradient, needs, *saved)
        tensors = saved[: ctx.count]
        wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]  # a second derivative is wanted
        found = iter(torch.autograd.grad(ctx.function.plain(*tensors), wanted, gradient, create_graph=True, allow_unused=True))
        return None, *(next(found) if need else None for need in needs)


class RemadeLinear(Handwritten):
    """Interface: (x, W, b, factors…) -> M x + b, with M made again in backward. W (m, n), where there is one, is frozen."""

    @abstractmethod
    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        """M (m, n), differentiable, and whatever else `pull` can use again."""

    @abstractmethod
    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        """Gradients of the factors from G = dL/dM (m, n), which may be overwritten."""

    def plain(self, *tensors: Any) -> Tensor:
        """M x + b in ordinary torch."""
        x, weight, bias, *factors = tensors
        return F.linear(x, self.make(weight, *factors)[0].to(x.dtype), bias)

    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        """Of x by M made again, of the factors by `pull`."""
        x, weight, _, *factors = tensors
        matrix, made = self.make(weight, *factors)
        x_gradient = gradient @ matrix.to(gradient.dtype) if needs[0] else None  # (…, n)
        if not any(needs[3:]):
            return x_gradient, *(None for _ in tensors[1:])
        rows = gradient.reshape(-1, gradient.shape[-1])  # (T, m)
        G = rows.t() @ x.reshape(-1, x.shape[-1])  # (m, n)
        return x_gradient, None, None, *self.pull(G, made, weight, *factors)


def frozen_linear(base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(x, W, b) of a frozen ordinary linear layer in the dtype it computes in, or None where the short ways are not allowed."""
    weight = base.plain_weight()
    if weight is None or not isinstance(layout, LinearLayout) or not can_fuse(x, weight, bias):
        return None
    dtype = compute_dtype(x, x.dtype)
    return x.to(dtype), layout.to_matrix(weight).to(dtype), None if bias is None else bias.to(dtype)


def sums_in_full(x: Tensor) -> bool:
    """Whether W + update can be summed before it meets x. In half precision a small update would be rounded away."""
    return x.dtype is torch.float64 or (x.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest")
