"""A learning rate that halves by itself when the validation accuracy stops rising, in the manner of Auto-PGD."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.core.errors import ArgumentError


class RateController:
    """Divides the rate at checkpoints where accuracies have stopped rising.

    The checkpoints are w₀ < w₁ < …; at w_j the rate falls if

    (i) fewer than `share` of the epochs since w_{j-1} were better than the one before them;
    (ii) the rate was not changed at w_{j-1}, and the best accuracy is still the one that it was there.

    The caller then takes up the best weights again.

    Args:
        checkpoints: w₀, w₁, … in epochs; 0, 16, 24, 28, 36, 40, 42, … 50 for small images, every 4 for large ones.
        rate: to start with.
        share: ρ of the first condition.
        divide: what the rate is divided by.

    Attributes:
        rate: now.
        best: best accuracy so far.
    """

    def __init__(self, checkpoints: Sequence[int], rate: float, share: float = 0.75, divide: float = 2.0) -> None:
        if len(checkpoints) < 2 or any(late <= early for early, late in itertools.pairwise(checkpoints)):
            raise ArgumentError(f"checkpoints are two epochs or more, rising, not {list(checkpoints)}")
        if not (rate > 0 and 0 <= share <= 1 and divide > 1):
            raise ArgumentError(f"rate > 0, share in [0, 1] and divide > 1 are needed, not {rate}, {share} and {divide}")
        self.checkpoints, self.rate, self.share, self.divide = list(checkpoints), rate, share, divide
        self.best = -math.inf
        self._last = -math.inf  # accuracy of the epoch before
        self._improved = 0  # epochs since the last checkpoint that were better than the one before them
        self._changed, self._best_then = False, -math.inf  # at the last checkpoint

    def after_epoch(self, epoch: int, accuracy: float) -> tuple[float, bool]:
        """Takes in the robust validation accuracy after an epoch; epochs count up from 0 or 1.

        Returns:
            The rate of the next epoch, and whether to take up the best weights again.
        """
        self._improved += accuracy > self._last
        self.best, self._last = max(self.best, accuracy), accuracy
        if epoch not in self.checkpoints:
            return self.rate, False
        place = self.checkpoints.index(epoch)
        falls = False
        if place:
            few = self._improved < self.share * (epoch - self.checkpoints[place - 1])
            falls = few or (not self._changed and self.best == self._best_then)
        if falls:
            self.rate /= self.divide
        self._changed, self._best_then, self._improved = falls, self.best, 0
        return self.rate, falls

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, to resume from."""
        return {key: value for key, value in vars(self).items() if key not in ("checkpoints", "share", "divide")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        vars(self).update(state)
