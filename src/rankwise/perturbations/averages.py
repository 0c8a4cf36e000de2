"""What perturbations keep from step to step per tensor: running averages of its gradients.

    average    d <- (1 - θ) d + θ g                                              starts at the first g
    mean       m <- b m + (1 - b) g                                              starts at 0
    variance   v <- b v + (1 - b) (g - m̂)²     m̂ the mean before this g          starts with the second g
    square     F <- b F + (1 - b) g²                                             starts at 0

m̂ and what is read of v and F are corrected for their start at 0. All in float32 or wider, named "site.role", sharded as the
tensor; a tensor whose shape has changed begins again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.core.sharding import sharded_like, whole


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Averages:
    """Running averages of the gradients of named tensors. `see` comes first, once per gradient."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}  # "site.role" -> name of the average -> value
        self._steps: dict[str, int] = {}  # gradients seen

    def see(self, name: str, gradient: Tensor) -> None:
        """Counts a gradient; what is kept follows its device and sharding, or begins again where its shape is another."""
        kept = self._kept.get(name, {})
        if any(value.shape != gradient.shape for value in kept.values()):
            kept, self._steps[name] = {}, 0
        self._kept[name] = {key: sharded_like(value, wide(gradient)) for key, value in kept.items()}
        self._steps[name] = self._steps.get(name, 0) + 1

    def average(self, name: str, gradient: Tensor, theta: float) -> Tensor:
        """The average d, this gradient included."""
        kept = self._kept[name]
        if "average" in kept:
            kept["average"].lerp_(wide(gradient), theta)
        else:
            kept["average"] = wide(gradient).clone()
        return kept["average"]

    def variance(self, name: str, gradient: Tensor, smoothing: float) -> Tensor | None:
        """The variance v, this gradient's deviation from the mean before it included; None at the first gradient."""
        kept, gradient, before = self._kept[name], wide(gradient), self._steps[name] - 1
        if before == 0:
            kept |= {"mean": (1 - smoothing) * gradient, "variance": torch.zeros_like(gradient)}
            return None
        correction = 1 - smoothing**before
        deviation = gradient - kept["mean"] / correction
        kept["variance"].lerp_(deviation.square(), 1 - smoothing)
        kept["mean"].lerp_(gradient, 1 - smoothing)
        return kept["variance"] / correction

    def square(self, name: str, gradient: Tensor, smoothing: float) -> Tensor:
        """The mean square F, this gradient included: the diagonal of the Fisher matrix as batches show it."""
        kept, squared = self._kept[name], wide(gradient).square()
        kept["square"] = (kept["square"] if "square" in kept else torch.zeros_like(squared)).lerp_(squared, 1 - smoothing)
        return kept["square"] / (1 - smoothing ** self._steps[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything kept, whole and copied, with the number of gradients seen."""
        return {
            name: {"steps": self._steps[name], **{key: whole(value).clone() for key, value in kept.items()}}
            for name, kept in self._kept.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._steps = {name: int(kept["steps"]) for name, kept in state.items()}
        self._kept = {name: {key: kept[key].clone() for key in kept if key != "steps"} for name, kept in state.items()}
