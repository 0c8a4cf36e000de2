"""The importance average: how much the loss would change without a number, smoothed over steps.

    I  = |w · ∂L/∂w|
    Ī <- β₁ Ī + (1 - β₁) I               sensitivity
    Ū <- β₂ Ū + (1 - β₂) |I - Ī|         uncertainty, with the new Ī
    s  = Ī · Ū

Everything starts at 0, without bias correction. One entry per entry of a tensor, two numbers kept for each.

Zhang et al.: PLATON: Pruning Large Transformer Models with Upper Confidence Bound of Weight Importance, 2022, arXiv:2206.12562.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.sharding import sharded_like, whole


class Importance:
    """Keeps Ī and Ū per named tensor.

    Args:
        beta1: β₁.
        beta2: β₂.
    """

    def __init__(self, *, beta1: float = 0.85, beta2: float = 0.85) -> None:
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ArgumentError(f"beta1 and beta2 lie in [0, 1), not {beta1} and {beta2}")
        self.beta1, self.beta2 = beta1, beta2
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def observe(self, name: str, tensor: Tensor, gradient: Tensor | None) -> None:
        """Takes in w and ∂L/∂w of one step; no gradient means that the loss did not depend on the tensor."""
        tensor = tensor.detach()
        now = torch.zeros_like(tensor) if gradient is None else (tensor * gradient).abs()
        if name in self._kept:
            mean, spread = (sharded_like(value, now) for value in self._kept[name])
        else:
            mean, spread = torch.zeros_like(now), torch.zeros_like(now)
        mean = self.beta1 * mean + (1 - self.beta1) * now
        spread = self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()
        self._kept[name] = (mean, spread)

    def averages(self, name: str) -> tuple[Tensor, Tensor]:
        """Ī and Ū of a tensor."""
        return self._kept[name]

    def score(self, name: str) -> Tensor:
        """Ī · Ū, in the tensor's shape."""
        mean, spread = self._kept[name]
        return mean * spread

    def state_dict(self) -> dict[str, Any]:
        """Both averages of every tensor."""
        return {name: (whole(mean).clone(), whole(spread).clone()) for name, (mean, spread) in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._kept = {name: (mean.clone(), spread.clone()) for name, (mean, spread) in state.items()}


def keep_best(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """Site -> (r,) True for the ranks among the `budget` best of all sites; ties go to the earlier one."""
    device = next(iter(scores.values())).device
    together = torch.cat([score.to(device) for score in scores.values()])  # (Σ r,)
    keep = torch.zeros_like(together, dtype=torch.bool)
    keep[together.sort(descending=True, stable=True).indices[:budget]] = True
    return dict(zip(scores, keep.split([score.numel() for score in scores.values()]), strict=True))
