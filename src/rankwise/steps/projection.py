"""The bases a gradient is projected on, and the rule that says on which side.

P (m, r) on the left and/or Q (r, n) on the right: R = PᵀG | G Qᵀ | PᵀG Qᵀ, and back P N | N Q | P N Q.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SIDES = ("std", "reverse_std", "left", "right", "full")


class Projection(NamedTuple):
    """The bases in use: P (m, r) with columns, Q (r, n) with rows; None where a side is whole."""

    P: Tensor | None
    Q: Tensor | None

    def down(self, matrix: Tensor) -> Tensor:
        """(m, n) -> the small shape."""
        small = matrix if self.P is None else self.P.mT @ matrix
        return small if self.Q is None else small @ self.Q.mT

    def up(self, small: Tensor) -> Tensor:
        """The small shape -> (m, n)."""
        matrix = small if self.P is None else self.P @ small
        return matrix if self.Q is None else matrix @ self.Q


def side_of(rule: str, m: int, n: int) -> str:
    """The side a rule projects an (m, n) matrix on: "left", "right" or "full". "std" shortens the shorter dimension."""
    if rule == "std":
        return "right" if m >= n else "left"
    if rule == "reverse_std":
        return "left" if m >= n else "right"
    return rule
