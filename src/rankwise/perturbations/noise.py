"""Gaussian noise on a layer's matrix, drawn when it is applied and again in backward, so that nothing of its size is kept.

    y = W' x + E x          E (m, n), E_ij ~ N(0, std_i²), std (m,)
    dL/dx += Eᵀ dL/dy       the same E; nothing is passed on to std

Beside x's gradient the node needs the seed and std, and keeps nothing else. E is drawn in float32 on the device of std.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Operator, compute_dtype
from rankwise.core.randomness import generator_for
from rankwise.core.transforms import transformed

Draw = Callable[[torch.dtype], Tensor]  # dtype -> E


class Noisy(Operator):
    """inner + E.

    Args:
        inner: what the noise is added to.
        std: (m,) of each row of E.
        key: names the draw: a seed, and what else tells it from others.
    """

    def __init__(self, inner: Operator, std: Tensor, key: tuple[int, *tuple[object, ...]]) -> None:
        self.inner, self.std, self.key = inner, std, key

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.inner.shape

    def noise(self, dtype: torch.dtype) -> Tensor:
        """E (m, n)."""
        generator = generator_for(*self.key, device=self.std.device)
        E = torch.randn(self.shape, generator=generator, dtype=torch.float32, device=self.std.device)  # (m, n)
        return E.to(torch.promote_types(dtype, torch.float32)).mul_(self.std[:, None]).to(dtype)

    def dense(self) -> Tensor:
        """The matrix with this E."""
        matrix = self.inner.dense()
        return matrix + self.noise(matrix.dtype)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        """Without bias."""
        return cast(Any, _added)(self.inner.apply(x, layout), x, self.noise, layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        """With bias, which has no noise."""
        return cast(Any, _added)(self.inner.affine(x, layout, bias), x, self.noise, layout)


@torch.compiler.disable
def _added(y: Tensor, x: Tensor, noise: Draw, layout: Layout) -> Tensor:
    """Y + E x, outside of a compiled graph, which cannot capture a private generator."""
    dtype = compute_dtype(x, y.dtype)
    if not x.is_floating_point() or transformed():
        return y + layout.matrix(x, noise(dtype)).to(y.dtype)
    return y + _Forward.apply(x.to(dtype), noise, layout).to(y.dtype)


class _Forward(torch.autograd.Function):
    """x -> E x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Draw, layout: Layout) -> Tensor:
        ctx.noise, ctx.layout, ctx.shape = noise, layout, x.shape
        return layout.matrix(x, noise(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Backward.apply(gradients[0], ctx.noise, ctx.layout, ctx.shape), None, None


class _Backward(torch.autograd.Function):
    """dL/dy -> Eᵀ dL/dy."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, noise: Draw, layout: Layout, shape: torch.Size) -> Tensor:
        ctx.noise, ctx.layout = noise, layout
        E = noise(gradient.dtype)
        if isinstance(layout, LinearLayout):
            return gradient @ E
        with torch.enable_grad():  # the map is linear, so its derivative is the same anywhere
            x = gradient.new_zeros(shape).requires_grad_()
            return torch.autograd.grad(layout.matrix(x, E), x, gradient)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _Forward.apply(gradients[0], ctx.noise, ctx.layout), None, None, None
