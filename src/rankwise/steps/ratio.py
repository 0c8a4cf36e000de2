"""LoRA+: B learns faster than A.

    η_A = η,   η_B = ratio · η,   ratio >= 1

Equal rates are inefficient for wide layers: with sign-like steps (Adam), both factors move the output by Θ(1) only if η_A
falls like 1/n while η_B stays, and no single rate does both. So the direction of B is multiplied by `ratio`, after the
moments and with the decoupled decay inside it, exactly as a parameter group with its own rate would do. Trained vectors
(DoRA's magnitude, a gate, the bias of a classification head) go with B, every other matrix with A. Schedulers scale both, so
the ratio stays. No state, no cost, and ratio = 1 is the plain step to the bit. Lower η by about 2 when the ratio is large.

It is not a change of the model: BA = (B/k)(kA) turns the ratio of rates into an imbalance of the factors. Where A is frozen
it is just another learning rate, and it is refused there.

*Differs*: the released code gives embedding adapters a rate of their own (1e-6) and takes vectors out of weight decay; here
the factors of an embedding are treated like any other, and decay of vectors is decided by `adamw(decay_vectors=…)`.

Hayou, Ghosh, Yu: LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, arXiv:2402.12354.
"""

from __future__ import annotations

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import DIRECTION, Block, State, Step, stateless


@register("step")
def lora_plus(*, ratio: float = 16.0) -> Step:
    """Multiplies the direction of B, and of trained vectors, by `ratio`.

    Args:
        ratio: η_B / η_A.

    Example:
        >>> rankwise.compose("lora(rank=8) + lora_plus(ratio=16)")
    """
    if not ratio > 0.0:
        raise ArgumentError(f"lora_plus: ratio is the rate of B over the rate of A and must be positive, not {ratio}")

    def update(directions: Block, state: State, parameters: Block) -> Block:
        return {
            role: direction * ratio if role == "B" or direction.dim() <= 1 else direction
            for role, direction in directions.items()
        }

    vectors_only = stateless(update, name="lora_plus", stage=DIRECTION)  # a head has no roles, but its bias goes with B
    return stateless(update, name="lora_plus", stage=DIRECTION, roles=("A", "B"))._replace(plain=vectors_only)
