"""LoRA on a convolution as the first release laid it out: the factors meet the weight with one kernel side each.

    ΔW = s · view(B A)          B (out·k/groups, r·k), A (r·k, in·k), viewed as the weight (out, in/groups, k, k)

The product is a matrix whose rows hold an output and one kernel side, and whose columns hold an input and the other; its
entries are read in order as the weight. That is another update than LoRA's usual one on a convolution (a convolution down to
r channels and a pointwise one up): its rank as (out·k/groups, in·k) is at most r·k, and as the matrix (out, in/groups·k²) at
most r·k². Square kernels only. B starts at 0, A as in LoRA. Trained numbers r·k²·(out/groups + in); the update is formed in
each forward, since a reshaped product has no cheaper way through a convolution, at 2r·k³·out·in/groups FLOPs.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685 (the convolution of its release).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.layouts import ConvLayout
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.queries import narrow_form
from rankwise.parameterizations.scaling import scale_of


class Viewed(Operator):
    """scale · B A read in order as an (m, n) matrix; B (m·h, q), A (q, n/h), so that h rows of the product make one row."""

    def __init__(self, B: Tensor, A: Tensor, shape: tuple[int, int], scale: float) -> None:
        self.B, self.A, self._shape, self.scale = B, A, shape, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def dense(self) -> Tensor:
        return (self.B @ self.A).reshape(self._shape) * self.scale


@narrow_form(Viewed)
def _(operator: Viewed) -> LowRank | None:
    m, n = operator.shape
    rows, rank = operator.B.shape
    if rows % m:  # several outputs share a row of the product
        return None
    heights = rows // m  # rows of the product that make one output's
    B = operator.B.reshape(m, heights * rank)
    A = torch.block_diag(*[operator.A] * heights)  # (heights·q, n)
    return LowRank(B, A, operator.scale) if heights * rank < min(m, n) else None


@register("parameterization")
class ReferenceConvLoRA(Additive):
    """ΔW = s · view(B A) on a convolution with a square kernel.

    Args:
        site: the layer.
        rank: r.
        alpha, scale: of s.
        dropout: probability of dropping an input of the update's branch.
    """

    facts = Facts(layouts=frozenset({"conv"}), exact_lora_export=False)

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float | None = None, scale: str = "lora", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.scale, self.dropout, self.thin = rank, scale_of(scale, alpha, rank), dropout, site.thin
        self.matrix_shape = (site.m, site.n)
        kernel, inputs, groups = _sizes(site)
        self.B = nn.Parameter(site.zeros(site.m * kernel // groups, rank * kernel))  # (out·k/groups, r·k)
        self.A = nn.Parameter(site.uniform(rank * kernel, inputs * kernel, bound=1 / math.sqrt(inputs * kernel)))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        layout = site.layout
        if not isinstance(layout, ConvLayout):
            return []
        square = len(layout.kernel) == 2 and layout.kernel[0] == layout.kernel[1]
        if square and site.m * layout.kernel[0] % layout.groups == 0:
            return []
        return [
            Problem(
                piece="ReferenceConvLoRA",
                needs="a square two-dimensional kernel whose side times the outputs divides into the groups",
                has=f"kernel {layout.kernel}, {layout.groups} groups",
                remedy="use conv='factor', which takes any convolution",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        update = Viewed(self.B, self.A, self.matrix_shape, self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update


def _sizes(site: Site) -> tuple[int, int, int]:
    """Kernel side, input channels of all groups, groups."""
    layout = site.layout
    assert isinstance(layout, ConvLayout)
    return layout.kernel[0], layout.channels * layout.groups, layout.groups
