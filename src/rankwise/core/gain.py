"""An update whose tensors see an output gradient that is multiplied row by row, while its value and input gradient stay.

    B' = B̄ + c ∘ (B - B̄)          g_B = diag(c) G Aᵀ
    + (c ∘ B̄)(A - Ā)              g_A = Bᵀ diag(c) G

with c (m,), bars for values without gradient and G = dL/dΔ: the added terms are zero and only carry gradients. So every layer
kind and binding has it, at the cost of a branch twice as wide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.core.combinators import Dropped
from rankwise.core.errors import TrainingError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.queries import as_low_rank


def with_gain(update: Operator, gain: Callable[[LowRank], Tensor]) -> Operator:
    """The same operator (m, n); gradients of its tensors are those for diag(gain) times the output's gradient.

    Raises:
        TrainingError: the update has no exact factors, as under dropout.
    """
    factors = None if isinstance(update, Dropped) else as_low_rank(update)
    if factors is None:
        raise TrainingError(
            "a step that rescales gradients by rows (allora) needs an update with factors B A, and this one has none; with "
            "dropout, set dropout=0"
        )
    B, A = factors.B, factors.A
    B_fixed, A_fixed = B.detach(), A.detach()
    with torch.no_grad():
        c = gain(LowRank(B_fixed, A_fixed, scale=factors.scale))[:, None].to(B.dtype)  # (m, 1)
    return LowRank(
        torch.cat([B_fixed + c * (B - B_fixed), c * B_fixed], dim=1),  # (m, 2r)
        torch.cat([A_fixed, A - A_fixed], dim=0),  # (2r, n)
        scale=factors.scale,
    )
