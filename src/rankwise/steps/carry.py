"""The moments of an inner step, read and moved to another basis, however that step keeps them (plain or in 8 bits)."""

from __future__ import annotations

from torch import Tensor

from rankwise.steps.bases import Kept
from rankwise.steps.eight_bit import read, write
from rankwise.steps.projection import Projection

FIRST, SECOND = ("exp_avg", "velocity"), ("exp_avg_sq",)


def first_moment(kept: Kept, prefix: str) -> Tensor | None:
    """The running mean of the small gradient; None where the inner step has none."""
    return next((mean for name in FIRST if (mean := read(kept, prefix + name)) is not None), None)


def second_moment(kept: Kept, prefix: str) -> Tensor | None:
    """The running mean of its square; None where the inner step has none."""
    return next((square for name in SECOND if (square := read(kept, prefix + name)) is not None), None)


def carry_moments(kept: Kept, old: Projection, new: Projection, prefix: str) -> None:
    """M <- the new coordinates of what M was in the old ones; V by way of √V, squared, so that it cannot become negative."""
    for name in FIRST:
        mean = read(kept, prefix + name)
        if mean is not None:
            write(kept, prefix + name, new.down(old.up(mean)))
    for name in SECOND:
        square = read(kept, prefix + name)
        if square is not None:
            write(kept, prefix + name, new.down(old.up(square.sqrt())).square())
