"""AdaLoRA: one budget of ranks for the whole model, handed to the layers that need it while training runs.

On the gated form ΔW = s/(r + 1e-5) · B diag(gate) A, with B (m, r), A (r, n) random and gate (r,) zero at the start, and:

    loss      + γ/(2L) Σ over L layers of ‖A Aᵀ - I‖_F + ‖Bᵀ B - I‖_F, added as a gradient (`orthogonality.py`)
    score     of triplet i: s(gate_i) + mean_j s(A_ij) + mean_k s(B_ki), s the importance average (`importance.py`), from the
              parameters after the step and the gradients before it; frozen over the last `final_steps`
    mask      the gates outside of the budget's best (`cubic.py`) are set to 0, every `interval` steps until the budget is
              reached and after every step from then on

Only the gate is zeroed: factors and moments stay, its gradient s B_iᵀ G A_iᵀ does not vanish, and a rank can come back until
the last mask. The divisor stays the starting rank. Shapes do not change, unless `prune` of `sora.py` is called at the end.

*Differs* from the release: exactly as many gates as the budget says are kept (ties go to the earlier one, the release's
threshold would cut them all); the budget is reached at step total - final also where `interval` does not divide it.

Zhang et al.: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv:2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Mask, RankSchedule
from rankwise.core.sharding import whole
from rankwise.core.step import Block
from rankwise.schedules.cubic import cubic_budget
from rankwise.schedules.importance import Importance, keep_best
from rankwise.schedules.orthogonality import add_orthogonality


@register("schedule")
class AdaLoRA(RankSchedule):
    """The global budget of AdaLoRA.

    Args:
        target_rank: average rank per layer at the end.
        total_steps: T, optimizer steps of the whole run.
        warmup_steps: steps before the first mask.
        final_steps: steps at the end with a fixed mask.
        interval: steps between masks.
        orthogonality: γ.
        beta1, beta2: of the importance average and of its uncertainty.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})
    prunes: ClassVar[bool] = True

    def __init__(
        self,
        *,
        target_rank: int = 8,
        total_steps: int,
        warmup_steps: int = 0,
        final_steps: int = 0,
        interval: int = 1,
        orthogonality: float = 0.1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        if min(target_rank, interval) < 1 or min(warmup_steps, final_steps, orthogonality) < 0:
            raise ArgumentError(
                "target_rank and interval are at least 1, warmup_steps, final_steps and orthogonality at least 0; they are "
                f"{target_rank}, {interval}, {warmup_steps}, {final_steps}, {orthogonality}"
            )
        if warmup_steps + final_steps >= total_steps:
            raise ArgumentError(
                f"warmup_steps + final_steps = {warmup_steps + final_steps} leave no step of total_steps = {total_steps} to "
                "prune in; pass your run's number of optimizer steps as total_steps, and smaller phases"
            )
        self.target_rank, self.total_steps, self.interval = target_rank, total_steps, interval
        self.warmup_steps, self.final_steps, self.orthogonality = warmup_steps, final_steps, orthogonality
        self.importance = Importance(beta1=beta1, beta2=beta2)
        self.kept: int | None = None  # gates alive after the last mask
        self.pattern: dict[str, Tensor] = {}  # site -> (r,) the final mask

    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Adds the gradient of the orthogonality term."""
        self._budgets(sites := _gated(blocks))
        add_orthogonality(sites.values(), self.orthogonality)

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Scores after the step, and masks when it is time."""
        sites, done = _gated(blocks), step + 1
        end = self.total_steps - self.final_steps
        if done < end:
            for site, block in sites.items():
                for role in sorted(self.roles):
                    self.importance.observe(f"{site}.{role}", block[role], block[role].grad)
        if done < end and (done <= self.warmup_steps or done % self.interval):
            return {}
        if done >= end and self.pattern:
            return {site: Mask(keep) for site, keep in self.pattern.items()}
        start, target = self._budgets(sites)
        budget = cubic_budget(
            done,
            start=start,
            target=target,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            final_steps=self.final_steps,
        )
        keep = keep_best({site: self.scores(site) for site in sites}, budget)
        self.kept = budget
        if done >= end:
            self.pattern = keep
        return {site: Mask(chosen) for site, chosen in keep.items()}

    def _budgets(self, sites: Mapping[str, Block]) -> tuple[int, int]:
        start, target = sum(block["gate"].numel() for block in sites.values()), self.target_rank * len(sites)
        if target >= start:
            raise ArgumentError(
                f"AdaLoRA is to prune {start} ranks of {len(sites)} layers down to target_rank = {self.target_rank} each, "
                f"{target} in all, so nothing would be pruned; start with a larger rank (1.5 × target_rank is usual)"
            )
        return start, target

    def scores(self, site: str) -> Tensor:
        """Importance of every triplet of a site, (r,)."""
        gate, A, B = (whole(self.importance.score(f"{site}.{role}")) for role in ("gate", "A", "B"))
        return gate + A.mean(dim=1) + B.mean(dim=0)

    def unfinished(self, step: int) -> str | None:
        """Says so when training ended before the ranks were pruned."""
        end = self.total_steps - self.final_steps
        if step >= end:
            return None
        so_far = "no rank was pruned" if self.kept is None else f"pruning had come to {self.kept} ranks"
        return (
            f"AdaLoRA: {so_far} in {step} steps; the target of {self.target_rank} per layer is reached at step {end}. "
            f"Set total_steps (now {self.total_steps}) to the length of the run"
        )

    def state_dict(self) -> dict[str, Any]:
        """Importance averages and the final mask."""
        return {"importance": self.importance.state_dict(), "kept": self.kept, "pattern": dict(self.pattern)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.importance.load_state_dict(state["importance"])
        self.kept, self.pattern = state["kept"], dict(state["pattern"])


def _gated(blocks: Mapping[str, Block]) -> dict[str, Block]:
    return {site: block for site, block in blocks.items() if AdaLoRA.roles <= block.keys()}
