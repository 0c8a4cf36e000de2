"""Parameterizations in a frame that is read off the weight: SVFit, LoLDU, PMSS, NoRA, LoRA-XS, SODA's spectrum.

    W' = W + s · left · core · right          left (m, r), right (r, n) frozen; core trained, (r, r), a diagonal, or a product

A method says which buffers hold its frame and how they are read; here they are registered, kept in checkpoints (the trained
numbers mean nothing under another frame, and pivots or signs may fall differently elsewhere) and left blank where a file will
fill them. Core and frame are copies: merging into W cannot move them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.combinators import Sum
from rankwise.core.layouts import ConvLayout, Layout, LinearLayout
from rankwise.core.operators import Base, Chain, Dense, Operator, compute_dtype
from rankwise.core.parameterization import Parameterization, Site


class Framed(Parameterization):
    """Interface: trains a core inside a frame that `read` takes off the weight.

    Attributes:
        frame: the frame's buffers, name -> shape in the letters m, n and r, such as {"B": "mr", "A": "rn"}.
        indices: those of them that hold whole numbers.
        derived: those that no file needs to keep, since `filled` finds them from the others and the weight.
    """

    frame: ClassVar[Mapping[str, str]]
    indices: ClassVar[frozenset[str]] = frozenset()
    derived: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def read(self, site: Site) -> Mapping[str, Tensor]:
        """The frame's tensors, from the site's weight."""

    def hold(self, site: Site, width: int) -> None:
        """Registers the frame of r = `width` as buffers."""
        sizes = {"m": site.m, "n": site.n, "r": width}
        found = {} if site.blank else self.read(site)
        for name, letters in self.frame.items():
            tensor = site.zeros(*(sizes[letter] for letter in letters))
            if name in self.indices:
                tensor = tensor.long()
            tensor = tensor if site.blank else tensor.copy_(found[name])
            self.register_buffer(name, tensor, persistent=name not in self.derived)


class Whole(Dense):
    """A matrix in place of a layer's own: in one kernel with the bias, so that an equal one gives the same to the bit."""

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.matrix, bias) if isinstance(layout, LinearLayout) else super().affine(x, layout, bias)


class Composed(Operator):
    """W + update, where the update's matrix is made once per forward if that is less work than going factor by factor.

    With inner width r, T tokens and gradients, the factors take 4r(m + n)T FLOPs and their product takes 4mnr + 2mnT (once per
    forward the matrix and the gradient of the core, per token the gradient of the matrix): less for r near min(m, n) and long
    batches. Without gradients it is 2r(m + n)T against 2mnr. A half-precision weight is left alone: it cannot hold small
    increments, which the factors beside it can.
    """

    def __init__(self, base: Operator, update: Chain) -> None:
        self.base, self.update = base, update

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def dense(self) -> Tensor:
        return self.base.dense() + self.update.dense()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if self.whole_is_less_work(x, layout):
            return Whole(self.dense()).apply(x, layout)
        return Sum(self.base, self.update).apply(x, layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        if self.whole_is_less_work(x, layout):
            return Whole(self.dense()).affine(x, layout, bias)
        return Sum(self.base, self.update).affine(x, layout, bias)

    def whole_is_less_work(self, x: Tensor, layout: Layout) -> bool:
        """Whether to multiply x by the matrix W'."""
        weight = self.base.plain_weight() if isinstance(self.base, Base) else None
        factor = self.update.factors[0]
        if weight is None or not weight.dtype == factor.dtype == compute_dtype(x, weight.dtype):
            return False
        (m, n), r = self.shape, min(factor.shape)
        if isinstance(layout, LinearLayout):
            tokens = x.numel() // n
        elif isinstance(layout, ConvLayout):
            tokens = x.numel() // (layout.channels * layout.groups * math.prod(layout.stride))
        else:  # looking up costs nothing
            return False
        if torch.is_grad_enabled():
            return m * n * (2 * r + tokens) < 2 * r * (m + n) * tokens
        return m * n < (m + n) * tokens
