"""A low-rank update under a mask on its inner channels, its outputs, or the whole branch (see `lora_dropout`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankwise.core.layouts import ConvLayout, Layout
from rankwise.core.operators import Base, LowRank, Operator, compute_dtype
from rankwise.core.queries import narrow_form

Draw = Callable[[Tensor, Sequence[int], torch.dtype], Tensor]


class MaskedBranch(Operator):
    """A low-rank update under a mask that `draw` (x, shape, dtype) gives; `dense` is what acts in eval."""

    def __init__(self, inner: LowRank, kind: str, granularity: str, draw: Draw) -> None:
        self.inner, self.kind, self.granularity, self.draw = inner, kind, granularity, draw

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense()

    def _of_call(self, x: Tensor) -> LowRank:
        """One mask for all of x is a factor of B."""
        B = self.inner.B  # (m, r)
        shape = {"rank": (1, B.shape[1]), "row": (B.shape[0], 1), "module": (1, 1)}[self.kind]
        return LowRank(B * self.draw(x, shape, B.dtype), self.inner.A, self.inner.scale)

    def _drawn(self, x: Tensor, y: Tensor, layout: Layout) -> Tensor:
        """A mask that multiplies y, the projected or the final output, per sample or token."""
        channel = y.dim() - 1 - (len(layout.kernel) if isinstance(layout, ConvLayout) else 0)
        shape = list(y.shape)
        if self.kind == "module":
            shape[channel] = 1
        if self.granularity == "sample":
            shape = [size if axis in (0, channel) else 1 for axis, size in enumerate(shape)]
        return self.draw(x, shape, y.dtype)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if self.kind == "output":
            y = self.inner.apply(x, layout)
            return y * self.draw(x, y.shape, y.dtype)
        if self.granularity == "call":
            return self._of_call(x).apply(x, layout)
        if self.kind != "rank":
            y = self.inner.apply(x, layout)
            return y * self._drawn(x, y, layout)
        dtype = compute_dtype(x, self.inner.A.dtype)
        z = layout.project(x, self.inner.A.to(dtype)) * self.inner.scale
        return layout.expand(z * self._drawn(x, z, layout), self.inner.B.to(dtype))

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        if self.kind == "output" or self.granularity != "call":
            return None
        return self._of_call(x).add_to_base(base, x, layout, bias)


@narrow_form(MaskedBranch)
def _(operator: MaskedBranch) -> LowRank | None:
    return operator.inner
