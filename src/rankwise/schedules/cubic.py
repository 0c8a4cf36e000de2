"""The cubic budget: how many ranks, or what share of entries, may live at a step; it falls fast at first and slowly at the end.

    t <= t_i           b_0
    t_i < t <= T - t_f floor(b_T + (b_0 - b_T) (1 - (t - t_i)/(T - t_f - t_i))³)
    later              b_T

A share is not rounded down, and a decimal number is meant as it is written: 0.05 is 1/20, so that what is counted with it
never falls one short.

Zhu, Gupta: To Prune, or Not to Prune, 2017, arXiv:1710.01878; used by AdaLoRA and by most rank schedules after it.
"""

from __future__ import annotations

import math
from fractions import Fraction


def cubic_budget(step: int, *, start: int, target: int, total_steps: int, warmup_steps: int, final_steps: int) -> int:
    """Ranks allowed after `step` steps.

    Args:
        step: t, steps done.
        start: b_0.
        target: b_T.
        total_steps: T.
        warmup_steps: t_i, during which nothing is pruned.
        final_steps: t_f, during which the budget stays at the target.
    """
    return math.floor(_between(step, start, target, warmup_steps, total_steps - final_steps))


def cubic_share(step: int, *, target: float, begin: int, end: int) -> Fraction:
    """The share allowed after `step` steps: 1 up to `begin`, `target` from `end` on."""
    return _between(step, 1, Fraction(str(target)), begin, end)


def _between(step: int, start: int, target: int | Fraction, begin: int, end: int) -> Fraction:
    if step <= begin:
        return Fraction(start)
    if step >= end:
        return Fraction(target)
    return target + (start - target) * (1 - Fraction(step - begin, end - begin)) ** 3
