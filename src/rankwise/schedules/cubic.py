"""The cubic budget: how many ranks may live at a step; it falls fast at first and slowly at the end.

    t <= t_i           b_0
    t_i < t <= T - t_f floor(b_T + (b_0 - b_T) (1 - (t - t_i)/(T - t_f - t_i))³)
    later              b_T

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
    end = total_steps - final_steps
    if step <= warmup_steps:
        return start
    if step >= end:
        return target
    left = 1 - Fraction(step - warmup_steps, end - warmup_steps)  # exact, so that floor never falls one short
    return math.floor(target + (start - target) * left**3)
