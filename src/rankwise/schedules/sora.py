"""SoRA: a gate between A and B is driven to exact zeros by soft thresholds, and what is zero is cut away after training.

    ΔW = (α/r) · B diag(gate) A         B (m, r) zero, A (r, n) Kaiming, gate (r,) Gaussian at the start
    after each step   gate <- T_ξ(gate),   T_ξ(v) = sign(v) · max(|v| - ξ, 0)

ξ is `threshold` ("constant") or `threshold` times the learning rate ("learning_rate", the paper's form). It is the proximal
step of ξ Σ|gate|, taken after whatever optimizer moved the gate; weight decay must not act on the gate (AdamW here leaves
vectors alone). `l1` adds λ₁/N Σ|gate| to the loss instead or as well, N the gates of the model: both together shrink twice.
A list of thresholds with `rung_steps` is the sparsifying ladder: each is held that many steps, the last one to the end.

Deleting a zero gate changes nothing, and the scale keeps the starting rank: see `prune`. Trained numbers r(m + n + 1).

*Differs* from the release: one optimizer for all; `compat="released"` gives its double threshold, which zeroes once more after
shrinking, so that everything below 2ξ dies. Its λ₁ = 10 is off by default.

Ding et al.: Sparse Low-rank Adaptation of Pre-trained Language Models, 2023, arXiv:2311.11696.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.handle import Handle
from rankwise.core.piece import register
from rankwise.core.protocols import Assign, Decision, RankSchedule, Resize
from rankwise.core.sharding import sharded_like, whole
from rankwise.core.step import Block

MODES = ("constant", "learning_rate")


def soft_threshold(values: Tensor, amount: float, *, compat: str | None = None) -> Tensor:
    """T_ξ(values); with compat="released", what is left below ξ is zeroed too."""
    shrunk = torch.sign(values) * (values.abs() - amount).clamp(min=0)
    return shrunk.masked_fill(shrunk.abs() < amount, 0.0) if compat == "released" else shrunk


def sparsifying_ladder(first: float, last: float, count: int, *, spacing: str = "linear") -> tuple[float, ...]:
    """Thresholds ξ_1 < … < ξ_K, evenly spaced in ξ ("linear"), in exp ξ ("log") or in log ξ ("exp")."""
    if count < 1 or not 0 < first <= last:
        raise ArgumentError(f"a ladder needs count >= 1 and 0 < first <= last, not {count}, {first}, {last}")
    there = {"linear": float, "log": math.exp, "exp": math.log}
    back = {"linear": float, "log": math.log, "exp": math.exp}
    if spacing not in there:
        raise ArgumentError(f"spacing is one of {', '.join(there)}, not {spacing!r}")
    low, high = there[spacing](first), there[spacing](last)
    return tuple(back[spacing](low + (high - low) * k / max(1, count - 1)) for k in range(count))


@register("schedule")
class SoRA(RankSchedule):
    """Soft thresholds on the gates.

    Args:
        threshold: ξ (or ξ / learning rate), or a ladder of them.
        mode: "constant", or "learning_rate" for threshold times learning rate.
        l1: λ₁ of the term in the loss.
        rung_steps: steps per threshold of a ladder.
        compat: "released" for the double threshold of the released optimizer.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"gate"})
    prunes: ClassVar[bool] = True
    shrinks_gates: ClassVar[bool] = True

    def __init__(
        self,
        *,
        threshold: float | Sequence[float] = 3e-4,
        mode: str = "constant",
        l1: float = 0.0,
        rung_steps: int | None = None,
        compat: str | None = None,
    ) -> None:
        ladder = (float(threshold),) if isinstance(threshold, int | float) else tuple(float(value) for value in threshold)
        if mode not in MODES or compat not in (None, "released"):
            raise ArgumentError(f"mode is one of {', '.join(MODES)} and compat None or 'released', not {mode!r} and {compat!r}")
        if not ladder or min(ladder) < 0 or l1 < 0:
            raise ArgumentError(f"threshold and l1 cannot be negative, nor the ladder empty; they are {threshold} and {l1}")
        if (len(ladder) > 1) != (rung_steps is not None) or (rung_steps is not None and rung_steps < 1):
            raise ArgumentError(
                f"a ladder of thresholds needs rung_steps >= 1, and one threshold none; there are {len(ladder)} thresholds and "
                f"rung_steps={rung_steps}"
            )
        self.ladder, self.mode, self.l1, self.rung_steps, self.compat = ladder, mode, l1, rung_steps, compat
        self.zeros = 0  # gates at zero after the last step

    def threshold_at(self, step: int) -> float:
        """The rung of the ladder at step number `step`."""
        return self.ladder[0 if self.rung_steps is None else min(step // self.rung_steps, len(self.ladder) - 1)]

    @torch.no_grad()
    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Adds λ₁/N sign(gate)."""
        gates = [block["gate"] for block in blocks.values() if "gate" in block] if self.l1 else []
        count = sum(gate.numel() for gate in gates)
        for gate in gates:
            extra = gate.sign() * (self.l1 / count)
            gate.grad = extra if gate.grad is None else gate.grad.add_(extra)

    @torch.no_grad()
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """The thresholded gates."""
        amount = self.threshold_at(step) * (learning_rate if self.mode == "learning_rate" else 1.0)
        gates = {site: whole(block["gate"].detach()) for site, block in blocks.items() if "gate" in block}  # (r,) each
        shrunk = {site: soft_threshold(gate, amount, compat=self.compat) for site, gate in gates.items()}
        self.zeros = sum(int((gate == 0).sum()) for gate in shrunk.values())
        return {site: Assign({"gate": sharded_like(gate, blocks[site]["gate"])}) for site, gate in shrunk.items()}

    def unfinished(self, step: int) -> str | None:
        """Says so when no gate has reached zero."""
        if self.zeros or not max(self.ladder):
            return None
        return f"SoRA: no gate reached zero in {step} steps; use a larger threshold (now {max(self.ladder):g}) or train longer"

    def state_dict(self) -> dict[str, Any]:
        """The count of zeros; the gates themselves are trained tensors."""
        return {"zeros": self.zeros}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.zeros = int(state["zeros"])


@torch.no_grad()
def prune(handle: Handle) -> dict[str, int]:
    """Cuts away every rank whose gate is zero, optimizer state too; the function and the scale stay. Site -> rank left."""
    decisions: dict[str, Decision] = {}
    for site in handle.targets:
        gate = handle.parameterization(site).roles().get("gate")
        if gate is None:
            raise ArgumentError(f"{site} has no gate to prune by; its recipe is {handle.recipe.name!r}")
        decisions[site] = Resize(whole(gate.detach()) != 0)
    handle.apply_(decisions)
    return {site: handle.parameterization(site).rank for site in handle.targets}
