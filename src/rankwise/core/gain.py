"""An update whose tensors see an output gradient that is multiplied row by row, while its value and input gradient stay.

    B' = B̄ + c ∘ (B - B̄)          g_B = diag(c) G Aᵀ
    + (c ∘ B̄)(A - Ā)              g_A = Bᵀ diag(c) G

with c (m,), bars for values without gradient and G = dL/dΔ: the added terms are zero and only carry gradients. So every layer
kind and binding has it, at the cost of a branch twice as wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.core.combinators import Dropped, Sum
from rankwise.core.errors import TrainingError
from rankwise.core.layouts import Layout
from rankwise.core.operators import LowRank, Operator
from rankwise.core.queries import as_low_rank


class Gain(NamedTuple):
    """What to multiply rows of the gradient by.

    Attributes:
        rows: update -> c (m,); picklable.
        inputs: whether the gradient that the update passes on to the layer's input is multiplied too.
    """

    rows: Callable[[LowRank], Tensor]
    inputs: bool = False


def with_gain(update: Operator, gain: Gain) -> Operator:
    """The same operator (m, n); gradients of its tensors are those for diag(c) times the output's gradient.

    Raises:
        TrainingError: the update has no exact factors.
    """
    if isinstance(update, Dropped):
        return Dropped(with_gain(update.inner, gain), update.probability, update.thin, update.kept)
    factors = as_low_rank(update)
    if factors is None:
        raise TrainingError("a step that rescales gradients by rows (allora) needs an update with exact factors B A")
    B, A, scale = factors.B, factors.A, factors.scale
    B_fixed, A_fixed = B.detach(), A.detach()
    with torch.no_grad():
        c = gain.rows(LowRank(B_fixed, A_fixed, scale))[:, None].to(B.dtype)  # (m, 1)
    scaled = LowRank(
        torch.cat([B_fixed + c * (B - B_fixed), c * B_fixed], dim=1),  # (m, 2r)
        torch.cat([A_fixed, A - A_fixed], dim=0),  # (2r, n)
        scale,
    )
    return Sum(scaled, _InputGradient(LowRank((c - 1) * B_fixed, A_fixed, scale))) if gain.inputs else scaled


class _InputGradient(Operator):
    """Zero, but for the gradient that it passes on to the layer's input: that of `inner`."""

    def __init__(self, inner: Operator) -> None:
        self.inner = inner

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        raise TrainingError("an input gradient can be rescaled on the layer's path only; use binding='path'")

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self.inner.apply(x - x.detach() if x.is_floating_point() else x, layout) * float(x.is_floating_point())
