"""RoseLoRA: the factors of LoRA lose most of their entries while they train, row by row of A and column by column of B.

    ΔW = s · B A          at the end each row of A (n,) and each column of B (m,) keeps about a share τ of its entries

    I = |θ · ∂L/∂θ|       with θ before the step;  Ī <- β Ī + (1 - β) I, from the first I on (`importance.py`)
    after step t          τ_t = 1 up to t = begin, τ + (1 - τ)(1 - (t - begin)/(end - begin))³, τ from t = end on (`cubic.py`)
                          in each row of A (column of B) of length n, k = ⌊n (1 - τ_t)⌋: entries whose Ī lies strictly below
                          the k-th smallest become 0, k - 1 of them; ties at it are kept. `clamp` bounds the rest, from t = 1

Few entries in the factors bound the zeros of the product from below: see `zeros_bound`. Moments stay, and the optimizer moves
pruned entries until the next pruning, so save after `after_step`, never between the optimizer's step and it. A pruned entry is
0 whenever its I is taken, so its Ī shrinks by β at every step, others by β at most, and it never comes back; a mask keeps that
true where averages underflow to ties. Extra numbers, per number of A and B: Ī, the mask, and θ between backward and step.

*Differs* from the release: decimals are exact (20 entries at τ = 0.05: k = 19, whatever floating point makes of it).

Wang, Liu, Li, Cheng, Zhao, Gao: RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for
Knowledge Editing and Fine-tuning, 2024, arXiv:2406.10777.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Assign, Decision, RankSchedule
from rankwise.core.sharding import whole
from rankwise.core.step import Block
from rankwise.schedules.cubic import cubic_share
from rankwise.schedules.importance import Importance, all_finite


@register("schedule")
class RoseLoRA(RankSchedule):
    """Prunes entries of A and B.

    Args:
        keep: τ, the share of every row of A and column of B that stays.
        begin: the last step without pruning; B starts at 0, so its first I says nothing.
        end: the step from which τ holds.
        smoothing: β.
        clamp: all entries are clamped to [-clamp, clamp] after every step; the authors' editing runs use 3e-3.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    prunes: ClassVar[bool] = True

    def __init__(
        self, *, keep: float = 0.05, begin: int = 3, end: int = 20, smoothing: float = 0.8, clamp: float | None = None
    ) -> None:
        if not 0 < keep <= 1 or (clamp is not None and clamp <= 0):
            raise ArgumentError(f"keep lies in (0, 1] and clamp is positive or None; they are {keep} and {clamp}")
        if not 1 <= begin < end:
            raise ArgumentError(
                f"begin is at least 1 and smaller than end, not {begin} and {end}: in the first step B is 0, so is the "
                "importance of all its entries, and pruning would be arbitrary"
            )
        self.keep, self.begin, self.end, self.clamp = keep, begin, end, clamp
        self.importance = Importance(beta1=smoothing, beta2=None, from_first=True)
        self.pruned: dict[str, Tensor] = {}  # "site.role" -> True where an entry is gone for good
        self._before: dict[str, Tensor] = {}  # the values before this step
        self._before_of = -1

    def share_at(self, step: int) -> Fraction:
        """τ_t after `step` steps."""
        return cubic_share(step, target=self.keep, begin=self.begin, end=self.end)

    @torch.no_grad()
    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Keeps the values; a second pass (SAM) asks again at a moved point, which does not count."""
        if self._before_of != step:
            self._before_of, self._before = step, {name: tensor.detach().clone() for name, tensor in self._factors(blocks)}

    @torch.no_grad()
    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Importances of this step, and the pruned factors when it is time."""
        factors = dict(self._factors(blocks))
        gradients = {name: tensor.grad for name, tensor in factors.items() if tensor.grad is not None}
        if all_finite(gradients.values()):  # a gradient scaler skips the others
            for name, tensor in factors.items():
                self.importance.observe(name, self._before.get(name, tensor), gradients.get(name))
        self._before, self._before_of = {}, -1
        share = self.share_at(step + 1)
        decisions: dict[str, Decision] = {}
        for site, block in blocks.items() if share < 1 or self.clamp is not None else ():
            left = {}
            for role in sorted(self.roles & block.keys()):
                length = block[role].shape[1 if role == "A" else 0]
                left[role] = self._prune(f"{site}.{role}", whole(block[role].detach()), math.floor(length * (1 - share)))
            if left:
                decisions[site] = Assign(left)
        return decisions

    def _factors(self, blocks: Mapping[str, Block]) -> list[tuple[str, Tensor]]:
        return [(f"{site}.{role}", block[role]) for site, block in blocks.items() for role in self.roles & block.keys()]

    def _prune(self, name: str, values: Tensor, k: int) -> Tensor:
        """The values without what was pruned before and what lies below the k-th smallest Ī of its row (A) or column (B)."""
        dimension = 1 if name.endswith(".A") else 0
        if k >= 1 and self.importance.knows(name):
            mean = whole(self.importance.score(name))
            gone = self.pruned.get(name, torch.zeros_like(mean, dtype=torch.bool)).to(mean.device)
            mean = mean.masked_fill(gone, -math.inf)
            self.pruned[name] = gone | (mean < mean.kthvalue(k, dim=dimension, keepdim=True).values)
        values = values.masked_fill(self.pruned[name], 0.0) if name in self.pruned else values
        return values if self.clamp is None else values.clamp(-self.clamp, self.clamp)

    def unfinished(self, step: int) -> str | None:
        """Says so when training ended before the factors were sparse, or nothing could be pruned."""
        zeros = sum(int(gone.sum()) for gone in self.pruned.values())
        if self.keep == 1 or (step >= self.end and zeros):
            return None
        if step >= self.end:
            return f"RoseLoRA: no entry was pruned in {step} steps; the layers are too narrow for keep={self.keep:g}, use less"
        so_far = f"{zeros} entries were pruned" if zeros else "no entry was pruned"
        return (
            f"RoseLoRA: {so_far} in {step} steps; the share keep={self.keep:g} is reached at step {self.end}. Set begin and "
            "end to about a tenth and eight tenths of the length of the run"
        )

    def state_dict(self) -> dict[str, Any]:
        """Importance averages and masks."""
        return {"importance": self.importance.state_dict(), "pruned": dict(self.pruned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.importance.load_state_dict(state["importance"])
        self.pruned = dict(state["pruned"])


def zeros_bound(B: Tensor, A: Tensor) -> float:
    """A lower bound on the share of zeros in B A, for B (m, r) and A (r, n): max(0, 1 - r + Σᵢ (aᵢ + bᵢ - aᵢ bᵢ)).

    aᵢ and bᵢ are the shares of zeros in row i of A and column i of B. Tight where the r rectangles do not overlap.
    """
    a, b = (A == 0).double().mean(dim=1), (B == 0).double().mean(dim=0)  # (r,)
    return max(0.0, float(1 - A.shape[0] + (a + b - a * b).sum()))
