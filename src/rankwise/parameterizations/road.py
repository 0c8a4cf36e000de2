"""RoAd: pairs of outputs are rotated by an angle and scaled by a gain; a batch may mix any number of adapters.

    W' = R W,  bias' = R bias,   (R z)_a = u_a z_a - v_a z_c,   (R z)_c = u_c z_c + v_c z_a

In a group of g outputs (g even), output a of the first half is paired with c = a + g/2. u and v (m,) come from `angle` θ and
`gain` α:

    variant 1   one θ and α per pair, (m/2,):      u = α cos θ, v = α sin θ at both ends
    variant 2   one per output, (m,):              the same with each output's own
    variant 4   two per output, (2m,):             u = α_0 cos θ_0, v = α_1 sin θ_1; a group holds its g zeros, then its g ones

θ starts at 0 and α at 1, so R = I and W' = W. The layer's output is rotated by two fused products per element (a convolution
forms W'); no matrix product. Trained numbers m, 2m or 4m. With variant 1 and α = 1, R is orthogonal, and two adapters in
sequence add their angles. Not additive, full rank in general; the bias part is no LoRA. No weight decay: it would pull α to
0.

*Differs*: nothing is scaled by a factor on R; weighted combinations of adapters weigh W' - W like everywhere.

Liao, Monz: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, 2024,
arXiv:2409.00119.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Rotated, row_pass
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.layouts import ConvLayout, Layout, LinearLayout
from rankwise.core.operators import Operator, compute_dtype
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.core.routing import gathered
from rankwise.parameterizations.cayley import misfit


class PairRotation(Operator):
    """R (m, m) of 2 × 2 blocks: x -> u ∘ x + v ∘ turned(x), where turned takes (x_a, x_c) to (-x_c, x_a); u, v (m,)."""

    def __init__(self, u: Tensor, v: Tensor, group: int) -> None:
        self.u, self.v, self.group = u, v, group

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.u), len(self.u)

    def turned(self, x: Tensor) -> Tensor:
        """(-x_c, x_a) at every pair (a, c) of the last dimension."""
        first, second = x.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)  # (…, groups, g/2)
        return torch.stack([-second, first], dim=-2).flatten(-3)

    def dense(self) -> Tensor:
        identity = torch.eye(len(self.u), dtype=self.u.dtype, device=self.u.device)
        return self.apply(identity, LinearLayout()).t()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        dtype = compute_dtype(x, self.u.dtype)
        x = x.to(dtype)
        return torch.addcmul(x * self.u.to(dtype), self.turned(x), self.v.to(dtype))


@row_pass(PairRotation)
def _(parts: Sequence[Operator], rows: Tensor, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
    pairs = [part for part in parts if isinstance(part, PairRotation)]
    if len(pairs) < len(parts) or len({pair.group for pair in pairs}) > 1 or bias is not None:
        return None
    u, v = (gathered(values, rows, x) for values in ([pair.u for pair in pairs], [pair.v for pair in pairs]))
    return torch.addcmul(x * u, pairs[0].turned(x), v)


@register("parameterization")
class RoAd(Parameterization):
    """W' = R W and R bias, R rotating and scaling pairs of outputs.

    Args:
        site: the layer.
        variant: 1, 2 or 4: how many numbers of each kind a pair of outputs has (4: two per output).
        group: g, outputs per group.
    """

    facts = Facts(additive=False, exact_lora_export=False)

    def __init__(self, site: Site, *, variant: int = 1, group: int = 64) -> None:
        super().__init__()
        self.variant, self.group = variant, group
        size = {1: site.m // 2, 2: site.m, 4: 2 * site.m}[variant]
        self.angle = nn.Parameter(site.zeros(size))  # (m/2,), (m,) or (2m,)
        self.gain = nn.Parameter(site.zeros(size) + 1)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        if arguments.get("variant", 1) not in (1, 2, 4):
            raise ArgumentError(f"variant is 1, 2 or 4, not {arguments['variant']!r}")
        return frozenset({"angle", "gain"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        group = arguments.get("group", 64)
        size = site.m // site.layout.groups if isinstance(site.layout, ConvLayout) else site.m  # no pair across conv groups
        if group >= 2 and group % 2 == 0 and size % group == 0:
            return []
        fitting = [value for value in range(2, size + 1, 2) if size % value == 0]
        remedy = f"use group={max(value for value in fitting if value <= max(group, 2))}" if fitting else "leave the layer out"
        return misfit("road", site, f"an even group that divides the {size} outputs", f"group is {group}", remedy)

    def rotation(self) -> PairRotation:
        """R (m, m)."""
        cosine, sine = self.gain * self.angle.cos(), self.gain * self.angle.sin()
        if self.variant == 1:  # both ends of a pair have the same
            cosine, sine = (value.view(-1, 1, self.group // 2).expand(-1, 2, -1).flatten() for value in (cosine, sine))
        elif self.variant == 4:
            cosine, sine = cosine.view(-1, 2, self.group)[:, 0].flatten(), sine.view(-1, 2, self.group)[:, 1].flatten()
        return PairRotation(cosine, sine, self.group)

    def forward(self, base: Operator) -> Operator:
        return Rotated(base, self.rotation(), side="output", whole=True)

    def adapted_bias(self, bias: Tensor) -> Tensor:
        return self.rotation().apply(bias, LinearLayout()).to(bias.dtype)
