"""BAR: SAM's useful side effect on LoRA, equal norms of the two factors, for the price of two norms per layer.

SAM shrinks |‖B‖² - ‖A‖²|, which plain gradient flow leaves alone. BAR does it directly: after backward and before the step,

    e = μ_t η                    strength times learning rate
    nBAR   ‖g_B‖ >= ‖g_A‖:  B <- (1 + e) B, A <- (1 - e) A;   else the other way round    (from the model f(x yᵀ))
    oBAR   ‖B‖   >= ‖A‖:    B <- (1 - e) B, A <- (1 + e) A;   else the other way round    (from the model f(xᵀ y))

per layer, so that depth does not dilute it. The product changes by the factor 1 - e² only. Gradients and moments stay as they
are. It is no weight decay: one factor grows while the other shrinks. μ_t is constant, or falls to 0 over `decay_steps` linearly
or as half a cosine. Trained numbers and export: those of the parameterization. Cost O(r(m + n)) per layer, no second pass.

*Differs*: at a tie (>=, as in the paper) with B = 0 both variants shrink A.

Li, Zhang, He: Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant Problems, 2024, arXiv:2410.14802.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, TrainingError
from rankwise.core.piece import register
from rankwise.core.protocols import Perturbation
from rankwise.core.sharding import whole
from rankwise.core.step import Block

KINDS = ("nbar", "obar")
DECAYS = ("linear", "cosine")


@register("perturbation")
class Balance(Perturbation):
    """NBAR and oBAR.

    Args:
        kind: "nbar" compares the gradients' norms, "obar" those of the factors.
        strength: μ₀.
        decay_steps: steps after which μ is 0; None keeps it constant.
        decay: "linear" or "cosine".
    """

    roles: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __init__(
        self, *, kind: str = "nbar", strength: float = 0.5, decay_steps: int | None = None, decay: str = "linear"
    ) -> None:
        if kind not in KINDS:
            raise ArgumentError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        if decay not in DECAYS:
            raise ArgumentError(f"decay is one of {', '.join(DECAYS)}, not {decay!r}")
        if strength < 0 or (decay_steps is not None and decay_steps < 1):
            raise ArgumentError(f"strength >= 0 and decay_steps >= 1 (or None) are needed, not {strength} and {decay_steps}")
        if decay != "linear" and decay_steps is None:
            raise ArgumentError(f"decay={decay!r} has no effect without decay_steps, the number of steps to decay over")
        self.kind, self.strength, self.decay_steps, self.decay = kind, strength, decay_steps, decay
        self.steps = 0

    @property
    def current_strength(self) -> float:
        """μ_t."""
        if self.decay_steps is None:
            return self.strength
        done = min(1.0, self.steps / self.decay_steps)
        return self.strength * (1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    @torch.no_grad()
    def move(self, blocks: Mapping[str, Block], *, learning_rate: float) -> None:
        """Rescales both factors of every site that has both."""
        e = self.current_strength * learning_rate
        if e >= 1:
            raise TrainingError(
                f"BAR rescales by 1 - e with e = strength · learning rate = {self.current_strength:g} · {learning_rate:g} = "
                f"{e:g}, which would flip signs; use a smaller strength or learning rate"
            )
        if e == 0:
            return
        for block in blocks.values():
            B, A = block.get("B"), block.get("A")
            if B is None or A is None or (B.grad is None and A.grad is None):
                continue
            grow_B = _norm(B.grad) >= _norm(A.grad) if self.kind == "nbar" else _norm(B) < _norm(A)
            B.mul_(1 + e if grow_B else 1 - e)
            A.mul_(1 - e if grow_B else 1 + e)

    def advance(self) -> None:
        """One optimizer step is done."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The clock of the decay."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the clock."""
        self.steps = int(state["steps"])


def _norm(tensor: Tensor | None) -> float:
    """Frobenius norm of the whole tensor in float32 or wider; 0 for a gradient that is not there."""
    if tensor is None:
        return 0.0
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return math.sqrt(float(whole(wide.square().sum())))
