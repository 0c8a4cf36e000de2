"""AFLoRA: projections that have stopped learning are frozen one by one, until only the vectors around them are trained.

On W' = W + diag(v) B diag(u) A (`projected_vectors.py`), with T steps in all, E = ⌊T / epochs⌋, and per projection P, A or B:

    I    = mean of |∂L/∂P| over the steps of one interval, entry by entry
    Ī, Ū   of I, at the end of each interval; s = Ī · Ū (`importance.py`)
    ρ    = 1 up to step t_i E, falling with the cube (`cubic.py`) to `keep` at T - t_f E
    θ    = the ⌊N (1 - ρ)⌋-th smallest entry of s over all N entries of the projections not yet frozen

At the end of each interval in between, and after every step beyond T - t_f E, every P whose mean of s lies below θ is frozen:
no gradient, no moments, nothing more to score. Comparing a mean with single entries is meant so; at ρ = 0 all is frozen but
tensors whose entries all score the same (without any gradient, say). `average_trained` is the paper's measure of size, trained
numbers averaged over steps. Extra: three numbers per number not yet frozen. Steps that a gradient scaler skips do not count.

*Differs* from the release: projections are frozen after a step instead of before the next one, which gives the same numbers.

Liu, Kundu, Li, Wan, Jiang, Beerel: AFLoRA: Adaptive Freezing of Low Rank Adaptation in Parameter Efficient Fine-Tuning of Large
Models, 2024, arXiv:2403.13269.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Freeze, RankSchedule
from rankwise.core.sharding import whole
from rankwise.core.step import Block
from rankwise.schedules.cubic import cubic_share
from rankwise.schedules.importance import Importance, IntervalMean, all_finite, small_means

PROJECTIONS = frozenset({"A", "B"})


@register("schedule")
class AFLoRA(RankSchedule):
    """Freezes A and B where their scores are small.

    Args:
        total_steps, epochs: of the whole run; T counts optimizer steps.
        warmup_epochs: t_i, epochs without freezing.
        final_epochs: t_f, epochs at the end with all projections frozen.
        interval: steps over which gradients are averaged.
        smoothing: β₁ of Ī.
        uncertainty_smoothing: β₂ of Ū.
        keep: ρ at the end; 0 freezes all, 1 nothing.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"A", "B", "u", "v"})

    def __init__(
        self,
        *,
        total_steps: int,
        epochs: int,
        warmup_epochs: int = 1,
        final_epochs: int = 14,
        interval: int = 10,
        smoothing: float = 0.85,
        uncertainty_smoothing: float = 0.95,
        keep: float = 0.0,
    ) -> None:
        if min(epochs, interval) < 1 or min(warmup_epochs, final_epochs) < 0 or not 0 <= keep <= 1:
            raise ArgumentError(
                "epochs and interval are at least 1, warmup_epochs and final_epochs at least 0, keep lies in [0, 1]; they are "
                f"{epochs}, {interval}, {warmup_epochs}, {final_epochs}, {keep}"
            )
        if total_steps < epochs or warmup_epochs + final_epochs > epochs:
            raise ArgumentError(
                f"warmup_epochs={warmup_epochs} and final_epochs={final_epochs} do not fit into epochs={epochs} of total_steps="
                f"{total_steps}, which are those of the whole run; final_epochs is about two thirds of them"
            )
        per_epoch = total_steps // epochs
        self.begin, self.end = warmup_epochs * per_epoch, total_steps - final_epochs * per_epoch
        self.interval, self.keep = interval, keep
        self.importance = Importance(beta1=smoothing, beta2=uncertainty_smoothing)
        self.gradients = IntervalMean()
        self.frozen: dict[str, int] = {}  # "site.role" -> step after which it was frozen
        self.left: int | None = None  # projections still trained
        self.trained = self.steps = 0  # numbers trained, summed over the steps

    @property
    def average_trained(self) -> float:
        """Trained numbers averaged over the steps so far."""
        return self.trained / max(1, self.steps)

    def share_at(self, step: int) -> Fraction:
        """ρ after `step` steps."""
        return cubic_share(step, target=self.keep, begin=self.begin, end=self.end)

    @torch.no_grad()
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Takes in the gradients, and freezes when it is time."""
        done, closing = step + 1, (step + 1) % self.interval == 0
        live = {name: tensor for name, tensor in _projections(blocks).items() if name not in self.frozen}
        vectors = [block[role] for block in blocks.values() for role in block.keys() - PROJECTIONS]
        self.trained, self.steps = self.trained + sum(p.numel() for p in (*vectors, *live.values())), self.steps + 1
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.abs() for name, p in live.items()}
        if all_finite(gradients.values()):
            self.gradients.add(gradients)
        for name, mean in self.gradients.close().items() if closing else ():
            self.importance.average(name, mean)
        share = self.share_at(done) if closing or done > self.end else 1
        scores = {name: whole(self.importance.score(name)) for name in live if share < 1 and self.importance.knows(name)}
        newly = small_means(scores, 1 - share)
        for name in newly:
            self.importance.forget(name)
        self.frozen, self.left = {**self.frozen, **dict.fromkeys(newly, done)}, len(live) - len(newly)
        chosen = {site: frozenset(role for role in block if f"{site}.{role}" in self.frozen) for site, block in blocks.items()}
        return {site: Freeze(roles) for site, roles in chosen.items() if roles}

    def unfinished(self, step: int) -> str | None:
        """Says so when training ended before the projections were frozen, or there were none."""
        reached = self.left == 0 or (self.keep > 0 and step >= self.end)
        if self.keep == 1 or (self.frozen and reached):
            return None
        if self.left == 0:
            return "AFLoRA: no projection was there to freeze; square layers freeze theirs at once, unless train_square=True"
        return (
            f"AFLoRA: {len(self.frozen) or 'no'} projections were frozen in {step} steps; the last are due at {self.end + 1}. "
            "Set total_steps and epochs to those of the run, and interval below them; layers without gradients never freeze"
        )

    def state_dict(self) -> dict[str, Any]:
        """The interval so far, the averages, what is frozen, and the count of trained numbers."""
        averages = {"importance": self.importance.state_dict(), "gradients": self.gradients.state_dict()}
        return {**averages, "frozen": dict(self.frozen), "left": self.left, "trained": self.trained, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.importance.load_state_dict(state["importance"])
        self.gradients.load_state_dict(state["gradients"])
        self.frozen, self.left = dict(state["frozen"]), state["left"]
        self.trained, self.steps = state["trained"], state["steps"]


def _projections(blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    return {f"{site}.{role}": block[role] for site, block in blocks.items() for role in block if role in PROJECTIONS}
