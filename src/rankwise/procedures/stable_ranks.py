"""Stable ranks: how they are counted, which rank follows from them, and when a count taken once per epoch has come to rest.

sr(W) = ⌊‖W‖_F² / σ_1²⌋,   1 ≤ sr ≤ rank;  it moves little when small singular values do, and not at all with the scale of W
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.approximations.starting import check_choice
from rankwise.core.errors import ArgumentError

RULES = ("scaled", "plain")
RECENT = 11  # slopes that count, as published for a window of 15


@torch.no_grad()
def stable_rank(W: Tensor) -> int:
    """⌊‖W‖_F² / σ_1²⌋ of a matrix (m, n): at least 1, at most its rank, and 0 for zeros alone."""
    wide = W.detach().double()
    gram = wide @ wide.mT if W.shape[0] <= W.shape[1] else wide.mT @ wide  # on the shorter side
    values = torch.linalg.eigvalsh(gram)  # σ², ascending
    ratio = torch.where(values[-1] > 0, gram.trace() / values[-1], 0.0)
    rounding = 8 * torch.finfo(W.dtype).eps * max(W.shape)  # equal singular values give a whole number, up to this
    return int(ratio * (1 + rounding))


def target_rank(full: int, sr_start: int, sr: int, rule: str = "scaled") -> int:
    """The rank to factorize at.

    Args:
        full: k = min(m, n).
        sr_start, sr: stable ranks at the beginning and now.
        rule: "scaled" or "plain".
    """
    found = sr if check_choice("rule", rule, RULES) == "plain" else -(-full * sr // max(sr_start, 1))
    return max(1, min(full, found))


class Watch:
    """Tells when the mean |slope| of a smoothed series is small: at rest, and from then on for good.

    The mean is exponential, y ← y + (v - y) · 2 / (window + 1), the slope of y the central difference.

    Args:
        window: span of the mean; the first `window` values never suffice.
        threshold: largest mean slope at rest.
    """

    def __init__(self, window: int = 15, threshold: float = 0.1) -> None:
        if window < 1 or threshold < 0:
            raise ArgumentError(f"window is at least 1 and threshold at least 0, not {window} and {threshold}")
        self.window, self.threshold = window, threshold
        self.rests = False
        self._count = 0
        self._means: list[float] = []  # the latest ones, as many as slopes need

    def add(self, value: float) -> bool:
        """Takes the next value; says whether the series rests."""
        last = self._means[-1] if self._means else float(value)
        self._means = [*self._means, last + (value - last) * 2 / (self.window + 1)][-RECENT - 2 :]
        self._count += 1
        if self._count > self.window and not self.rests:
            slopes = _slopes(self._means)[-min(RECENT, self.window) :]
            self.rests = sum(map(abs, slopes)) / len(slopes) <= self.threshold
        return self.rests

    def state_dict(self) -> dict[str, Any]:
        """Numbers to resume from."""
        return {"count": self._count, "means": list(self._means), "rests": self.rests}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._count, self._means, self.rests = int(state["count"]), list(state["means"]), bool(state["rests"])


def _slopes(values: list[float]) -> list[float]:
    """Central differences, one-sided at the ends."""
    inner = [(later - earlier) / 2 for earlier, later in zip(values, values[2:], strict=False)]
    return [values[1] - values[0], *inner, values[-1] - values[-2]]
