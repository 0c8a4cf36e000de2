"""IA3: one trained factor per output, or per input, of a layer.

    output   W' = diag(l) W,   bias' = l ∘ bias          gain l (m,)
    input    W' = W diag(l),   bias unchanged            gain l (n,)

l starts at 1, so W' = W. The paper scales the outputs of key and value projections and the inputs of the second feed-forward
map: name the latter in `input_layers` (their last name or the full one). A convolution has one factor per channel: l
(channels in) on the input side, groups and all. An embedding's inputs are tokens, one factor each. Trained numbers m or n;
one product per element per token and no matrix product. Not additive, since a product of W, and of full rank: it exports as
LoRA only by truncation, the bias not at all. A batch with one adapter per row runs in one pass. Weight decay would pull l to
0: leave it out.

Not DoRA, whose gains leave the bias and divide by the norms of the rows.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning, 2022, arXiv:2205.05638.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.combinators import ColumnScale, RowScale
from rankwise.core.errors import ArgumentError, did_you_mean
from rankwise.core.layouts import ConvLayout, Layout
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register


class ChannelScale(Operator):
    """A convolution of scaled channels: gain (groups · channels,) meets the input, the frozen layer does the rest."""

    def __init__(self, inner: Operator, gain: Tensor, layout: ConvLayout) -> None:
        self.inner, self.gain, self.layout = inner, gain, layout

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        m, _ = self.shape
        kernel = torch.Size(self.layout.kernel).numel()
        per_group = self.gain.view(self.layout.groups, -1).repeat_interleave(kernel, 1)  # (groups, n)
        return self.inner.dense() * per_group.repeat_interleave(m // self.layout.groups, 0)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self.inner.apply(self._scaled(x), layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        return self.inner.affine(self._scaled(x), layout, bias)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.gain.to(x.dtype).view(-1, *(1 for _ in self.layout.kernel))


@register("parameterization")
class IA3(Parameterization):
    """W' = diag(l) W with the bias, or W diag(l).

    Args:
        site: the layer.
        side: "output" or "input", for all layers that `input_layers` does not name.
        input_layers: names of layers that take the input side, the last part of the name or the whole.
    """

    facts = Facts(additive=False, exact_lora_export=False)

    def __init__(self, site: Site, *, side: str = "output", input_layers: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.side = "input" if _named(site, input_layers) else side
        self.layout = site.layout
        if self.side == "output":
            size = site.m
        else:
            size = site.layout.groups * site.layout.channels if isinstance(site.layout, ConvLayout) else site.n
        self.gain = nn.Parameter(site.zeros(size) + 1)  # (m,), or (n,), or (channels,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        side, names = arguments.get("side", "output"), arguments.get("input_layers", ())
        if side not in ("output", "input"):
            raise ArgumentError(f"side is output or input, not {side!r}")
        if side == "input" and names:
            raise ArgumentError("side='input' is for all layers already, so input_layers would have no effect; leave one out")
        return frozenset({"gain"})

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        """Nothing is shared; here all sites are known, so that a name that none of them has is found."""
        known = {part for site in sites for part in (site.name, site.name.rsplit(".", 1)[-1])}
        for name in arguments.get("input_layers", ()):
            if name not in known:
                raise ArgumentError(f"input_layers: {name!r} is no adapted layer. {did_you_mean(name, known)}")
        return None

    def forward(self, base: Operator) -> Operator:
        if self.side == "output":
            return RowScale(base, self.gain, whole=True)
        if isinstance(self.layout, ConvLayout):
            return ChannelScale(base, self.gain, self.layout)
        return ColumnScale(base, self.gain)

    def adapted_bias(self, bias: Tensor) -> Tensor:
        return bias * self.gain.to(bias.dtype) if self.side == "output" else bias


def _named(site: Site, names: tuple[str, ...]) -> bool:
    return site.name in names or site.name.rsplit(".", 1)[-1] in names
