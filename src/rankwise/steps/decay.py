"""Decoupled weight decay by role: p <- p - η λ p beside whatever makes the update.

Matrices decay, vectors do not unless asked for: VeRA's d and b, DoRA's magnitude, a gate or a bias are sizes, and pulling them
to zero changes the method (a VeRA vector at zero switches its layer off). Runs behind the moments, so it is decoupled for every
one of them, LoRA-Pro's and a projector's too. λ = 0 is no change. Beside `adamw(weight_decay=…)` both would act.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2017, arXiv:1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import DIRECTION, Block, State, Step, stateless


@register("step")
def decoupled_weight_decay(*, weight_decay: float = 0.01, roles: Sequence[str] | None = None, vectors: bool = False) -> Step:
    """Adds λ p to the directions of some roles.

    Args:
        weight_decay: λ.
        roles: which tensors decay; None means all, a head beside the adapter too.
        vectors: whether tensors of one dimension or none decay as well.

    Example:
        >>> rankwise.compose("lora + decoupled_weight_decay(weight_decay=0.1, roles=('B',))")
    """
    if isinstance(roles, str):
        raise ArgumentError(f"decoupled_weight_decay: roles is a list of names, such as ({roles!r},), not {roles!r}")
    if not weight_decay >= 0.0:
        raise ArgumentError(f"decoupled_weight_decay: weight_decay is λ >= 0, not {weight_decay}")
    chosen = None if roles is None else frozenset(roles)

    def decays(role: str, dimensions: int) -> bool:
        return (chosen is None or role in chosen) and (vectors or dimensions > 1)

    def update(directions: Block, state: State, parameters: Block) -> Block:
        return {
            role: direction.add(parameters[role], alpha=weight_decay) if decays(role, parameters[role].dim()) else direction
            for role, direction in directions.items()
        }

    step = stateless(update, name="decoupled_weight_decay", stage=DIRECTION, roles=chosen or ())
    return step if chosen else step._replace(plain=step)
