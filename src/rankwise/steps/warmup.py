"""A rise of the learning rate that begins again every few steps, for procedures that begin again themselves.

    direction <- direction · min(1, (t + 1)/(warmup + 1)),  t = 0, 1, … the steps since the present interval began

A tensor whose state is dropped counts from zero again; so does every other one at each multiple of `interval`.
"""

from __future__ import annotations

import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import DIRECTION, Block, State, Step


@register("step")
def restarting_warmup(*, interval: int, warmup: int) -> Step:
    """Shortens the first `warmup` steps of every interval.

    Args:
        interval: steps from one beginning to the next.
        warmup: steps of the rise, fewer than that.
    """
    if not 0 <= warmup < interval:
        raise ArgumentError(f"warmup is 0 to interval - 1 = {interval - 1} steps, not {warmup}")

    def init(block: Block) -> State:
        return {role: {"since": torch.zeros((), dtype=torch.float32)} for role in block}

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        found = {}
        for role, direction in gradients.items():
            since = int(state[role]["since"]) % interval
            state[role]["since"].add_(1)
            found[role] = direction * min(1.0, (since + 1) / (warmup + 1))
        return found

    return Step(init, update, "restarting_warmup", DIRECTION)
