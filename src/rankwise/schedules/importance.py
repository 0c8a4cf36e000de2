"""The importance average: how much the loss would change without a number, smoothed over steps.

    I  = |w · ∂L/∂w|
    Ī <- β₁ Ī + (1 - β₁) I               sensitivity
    Ū <- β₂ Ū + (1 - β₂) |I - Ī|         uncertainty, with the new Ī
    s  = Ī · Ū

Everything starts at 0, without bias correction. One entry per entry of a tensor, two numbers kept for each. Other schedules
average another I, leave out Ū (then s = Ī, and one number is kept), or begin with the first I instead of 0.

Zhang et al.: PLATON: Pruning Large Transformer Models with Upper Confidence Bound of Weight Importance, 2022, arXiv:2206.12562.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.sharding import sharded_like, whole


class Importance:
    """Keeps Ī and Ū per named tensor.

    Args:
        beta1: β₁.
        beta2: β₂; None for no uncertainty.
        from_first: begin at the first I.
    """

    def __init__(self, *, beta1: float = 0.85, beta2: float | None = 0.85, from_first: bool = False) -> None:
        if not (0 <= beta1 < 1 and 0 <= (beta2 or 0) < 1):
            raise ArgumentError(f"beta1 and beta2 lie in [0, 1), not {beta1} and {beta2}")
        self.beta1, self.beta2, self.from_first = beta1, beta2, from_first
        self._kept: dict[str, tuple[Tensor, ...]] = {}  # Ī and, unless it is left out, Ū

    @torch.no_grad()
    def observe(self, name: str, tensor: Tensor, gradient: Tensor | None) -> None:
        """Takes in w and ∂L/∂w of one step; no gradient means that the loss did not depend on the tensor."""
        tensor = tensor.detach()
        self.average(name, torch.zeros_like(tensor) if gradient is None else (tensor * gradient).abs())

    @torch.no_grad()
    def average(self, name: str, now: Tensor) -> None:
        """Takes in I of one step."""
        if name in self._kept:
            mean, *spread = (sharded_like(value, now) for value in self._kept[name])
            mean = self.beta1 * mean + (1 - self.beta1) * now
        else:
            mean = now.clone() if self.from_first else (1 - self.beta1) * now
            spread = [] if self.beta2 is None else [torch.zeros_like(now)]
        if self.beta2 is not None:
            spread = [self.beta2 * spread[0] + (1 - self.beta2) * (now - mean).abs()]
        self._kept[name] = (mean, *spread)

    def knows(self, name: str) -> bool:
        """Whether the tensor has been observed."""
        return name in self._kept

    def forget(self, name: str) -> None:
        """Frees what is kept for a tensor."""
        self._kept.pop(name, None)

    def averages(self, name: str) -> tuple[Tensor, ...]:
        """Ī and Ū of a tensor."""
        return self._kept[name]

    def score(self, name: str) -> Tensor:
        """Ī · Ū, or Ī without Ū, in the tensor's shape."""
        mean, *spread = self._kept[name]
        return mean * spread[0] if spread else mean

    def state_dict(self) -> dict[str, Any]:
        """Both averages of every tensor."""
        return {name: tuple(whole(value).clone() for value in kept) for name, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._kept = {name: tuple(value.clone() for value in kept) for name, kept in state.items()}


class IntervalMean:
    """Means of named tensors over an interval of steps."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Takes in the tensors of one step."""
        self._steps += 1
        self._sums = {name: self._sum(name, value) for name, value in values.items()}

    def _sum(self, name: str, value: Tensor) -> Tensor:
        return sharded_like(self._sums[name], value) + value if name in self._sums else value

    def close(self) -> dict[str, Tensor]:
        """The means, and a new interval begins."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        self._sums, self._steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, and the number of steps."""
        return {"sums": {name: whole(total).clone() for name, total in self._sums.items()}, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._sums, self._steps = {name: total.clone() for name, total in state["sums"].items()}, int(state["steps"])


def all_finite(gradients: Iterable[Tensor]) -> bool:
    """Whether no gradient holds NaN or infinity. Steps with some are skipped by a gradient scaler, and must not be averaged."""
    flags = [torch.isfinite(whole(gradient)).all() for gradient in gradients]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def keep_best(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Site -> (r,) True for the ranks among the `budget` best of all sites; ties go to the earlier one."""
    device = next(iter(scores.values())).device
    together = torch.cat([score.to(device) for score in scores.values()])  # (Σ r,)
    keep = torch.zeros_like(together, dtype=torch.bool)
    keep[together.sort(descending=True, stable=True).indices[:budget]] = True
    return dict(zip(scores, keep.split([score.numel() for score in scores.values()]), strict=True))


def small_means(scores: Mapping[str, Tensor], share: Fraction | int) -> list[str]:
    """Names of tensors whose mean lies below the ⌊N · share⌋-th smallest of all N entries together; none where that is 0."""
    count = math.floor(sum(score.numel() for score in scores.values()) * share)
    if count < 1:
        return []
    device = next(iter(scores.values())).device
    threshold = torch.cat([score.flatten().to(device) for score in scores.values()]).kthvalue(count).values
    below = torch.stack([score.mean().to(device) for score in scores.values()]) < threshold
    return [name for name, small in zip(scores, below.tolist(), strict=True) if small]
