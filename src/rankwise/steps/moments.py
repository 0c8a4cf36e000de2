"""AdamW and SGD as steps: the ones that turn a gradient into the update itself.

AdamW keeps m̂, v̂ (exponential means of g and g²) and gives m̂/(√v̂ + ε) + λ p; decoupled decay λ leaves out vectors and
other 1-D tensors by default, since decaying a magnitude or a VeRA vector shrinks the layer or the whole adapter. State: two
numbers per trained number. Equal to `torch.optim.AdamW` and `torch.optim.SGD` to rounding. With `bits=8` both means are kept in
torchao's blockwise codes (see `eight_bit`), a quarter of the bytes, and equal `torchao.optim.AdamW8bit`.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2017, arXiv:1711.05101.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.sharding import local_as, local_part
from rankwise.core.step import MOMENTS, Block, State, Step
from rankwise.steps import eight_bit

MEANS = ("exp_avg", "exp_avg_sq")


@register("step")
def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_vectors: bool = False,
    bits: int = 32,
) -> Step:
    """AdamW.

    Args:
        betas: decay rates of the two means.
        eps: added to √v̂.
        weight_decay: λ, decoupled.
        decay_vectors: decay 1-D tensors as well.
        bits: 32 keeps the means in the dtype of the tensor, 8 in codes of one byte where a tensor has 4096 numbers or more.

    Raises:
        ArgumentError: a number out of range, or 8 bits without torchao.
    """
    first, second = betas
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0 and eps >= 0.0 and weight_decay >= 0.0):
        raise ArgumentError(
            f"adamw needs betas in [0, 1), eps >= 0 and weight_decay >= 0, not betas={betas}, eps={eps}, "
            f"weight_decay={weight_decay}"
        )
    if bits not in (8, 32):
        raise ArgumentError(f"adamw keeps its means in bits=32 or bits=8, not {bits}")
    if bits == 8:
        eight_bit.require_torchao()

    def init(block: Block) -> State:
        state: State = {}
        for role, tensor in block.items():
            state[role] = {"step": torch.zeros((), dtype=torch.float32)}
            for name in MEANS:
                state[role].update(eight_bit.zeros(name, tensor) if bits == 8 else eight_bit.plain_zeros(name, tensor))
        return state

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        return {role: _in_bits(gradients[role], state[role], parameters[role]) for role in gradients}

    def _in_bits(gradient: Tensor, kept: dict[str, Tensor], parameter: Tensor) -> Tensor:
        if "exp_avg_codes" not in kept:
            return _direction(gradient, kept, parameter)
        # The direction is made from the means before they are rounded to codes again.
        means = {name: cast(Tensor, eight_bit.read(kept, name)) for name in MEANS}
        direction = _direction(local_part(gradient), {**kept, **means}, local_part(parameter))
        for name, value in means.items():
            eight_bit.write(kept, name, value)
        return local_as(direction, gradient)

    def _direction(gradient: Tensor, kept: dict[str, Tensor], parameter: Tensor) -> Tensor:
        kept["step"] += 1
        count, mean, square = float(kept["step"]), kept["exp_avg"], kept["exp_avg_sq"]
        gradient = gradient.to(mean.dtype)
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # m̂/(√v̂ + ε) with both corrections folded into the denominator: one temporary instead of three.
        corrected = 1 - first**count
        direction = square.sqrt().mul_(corrected / math.sqrt(1 - second**count)).add_(corrected * eps)
        torch.div(mean, direction, out=direction)
        if weight_decay and (decay_vectors or parameter.dim() > 1):
            direction.add_(parameter, alpha=weight_decay)
        return direction

    def rescaled(kept: dict[str, Tensor], factor: Tensor) -> None:
        means = (f"{name}_scale" if f"{name}_scale" in kept else name for name in MEANS)
        for name, divisor in zip(means, (factor, factor * factor), strict=True):
            kept[name].div_(divisor)  # p -> c p makes g -> g / c

    return Step(init, update, "adamw", MOMENTS, rescaled=rescaled)


@register("step")
def sgd(*, momentum: float = 0.0, weight_decay: float = 0.0) -> Step:
    """SGD, with heavy-ball momentum if asked for.

    Args:
        momentum: μ in v <- μ v + g.
        weight_decay: λ, added to the gradient as λ p.
    """
    if not (0.0 <= momentum < 1.0 and weight_decay >= 0.0):
        raise ArgumentError(
            f"sgd needs momentum in [0, 1) and weight_decay >= 0, not momentum={momentum}, weight_decay={weight_decay}"
        )

    def init(block: Block) -> State:
        return {role: {"velocity": torch.zeros_like(tensor)} if momentum else {} for role, tensor in block.items()}

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        directions = {}
        for role, gradient in gradients.items():
            direction = gradient.add(parameters[role], alpha=weight_decay) if weight_decay else gradient
            if momentum:
                direction = state[role]["velocity"].mul_(momentum).add_(direction)
            directions[role] = direction
        return directions

    def rescaled(kept: dict[str, Tensor], factor: Tensor) -> None:
        if momentum:
            kept["velocity"].div_(factor)

    return Step(init, update, "sgd", MOMENTS, rescaled=rescaled)
