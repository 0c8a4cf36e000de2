"""One layer as two: x -> A x (r channels) -> B (A x) + bias, with ordinary layers inside.

    Linear, Conv1D    Linear(n, r), Linear(r, m)
    Conv1d/2d/3d      the same kernel, stride and padding into r channels, then a 1×1 convolution; with groups, every group
                      projects with the one shared A (so that r(m + n) numbers describe it) and has its own rows of B
    Embedding         Embedding(n, r), Linear(r, m)

The children are named `A` and `B`; `A` has no bias, `B` has the layer's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.core.layouts import ConvLayout
from rankwise.core.operators import LowRank
from rankwise.core.targets import Target


class Factorized(nn.Sequential):
    """The layers `A` and `B` one after the other, in place of one layer."""

    A: nn.Module
    B: nn.Module

    def __init__(self, A: nn.Module, B: nn.Module) -> None:
        super().__init__(OrderedDict(A=A, B=B))

    @property
    def rank(self) -> int:
        """R."""
        return cast(Tensor, self.B.weight).shape[1]

    def low_rank(self) -> LowRank:
        """The matrices (B, A) in the dtype they are stored in."""
        B, A = cast(Tensor, self.B.weight).detach(), cast(Tensor, self.A.weight).detach()
        A = A.t() if isinstance(self.A, nn.Embedding) else A.flatten(1)
        return LowRank(B.flatten(1), A)


class SharedProjection(nn.Module):
    """The first factor of a grouped convolution: every group's inputs through the same filters (r, in / groups, kernel…)."""

    def __init__(self, weight: Tensor, layout: ConvLayout) -> None:
        super().__init__()
        self.weight, self.layout = nn.Parameter(weight), layout

    def forward(self, x: Tensor) -> Tensor:
        """X -> A x, groups × r channels."""
        return self.layout.project(x, self.weight.flatten(1))


def factorized(target: Target, factors: LowRank) -> Factorized:
    """The two layers that stand for B A in place of a layer; its bias, dtype, device and training mode are kept."""
    pair, weight = factors.folded(), target.parameter()
    B = pair.B.detach().to(device=weight.device, dtype=weight.dtype)  # (m, r)
    A = pair.A.detach().to(device=weight.device, dtype=weight.dtype)  # (r, n)
    bias = getattr(target.module, "bias", None)
    if isinstance(target.layout, ConvLayout):
        result = _convolution(target.module, target.layout, B, A, bias)
    elif target.layout.kind == "embedding":
        with torch.device("meta"):
            table = nn.Embedding(target.n, A.shape[0], cast(nn.Embedding, target.module).padding_idx)
        table.weight = nn.Parameter(A.t().contiguous())
        result = Factorized(table, _linear(B, bias))
    else:
        result = Factorized(_linear(A, None), _linear(B, bias))
    for parameter in result.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return result.train(target.module.training)


def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):  # nothing is drawn, so the global generator stays where it is
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(matrix.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _convolution(layer: nn.Module, layout: ConvLayout, B: Tensor, A: Tensor, bias: Tensor | None) -> Factorized:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(layout.kernel) - 1]
    filters = A.reshape(-1, layout.channels, *layout.kernel).contiguous()  # (r, in / groups, kernel…)
    rank, m, geometry = A.shape[0], B.shape[0], cast(Any, layer)
    with torch.device("meta"):
        second = kind(rank * layout.groups, m, 1, groups=layout.groups, bias=bias is not None)
    second.weight = nn.Parameter(B.reshape(m, rank, *(1 for _ in layout.kernel)).contiguous())
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone())
    if layout.groups > 1:
        return Factorized(SharedProjection(filters, layout), second)
    with torch.device("meta"):
        first = kind(
            layout.channels,
            rank,
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            bias=False,
            padding_mode=geometry.padding_mode,
        )
    first.weight = nn.Parameter(filters)
    return Factorized(first, second)
