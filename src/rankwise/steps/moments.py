"""AdamW and SGD as steps: the ones that turn a gradient into the update itself.

AdamW keeps m̂, v̂ (exponential means of g and g²) and gives m̂/(√v̂ + ε) + λ p; decoupled decay λ leaves out vectors and
other 1-D tensors by default, since decaying a magnitude or a VeRA vector shrinks the layer or the whole adapter. State: two
numbers per trained number. Equal to `torch.optim.AdamW` and `torch.optim.SGD` to rounding.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, 2017, arXiv:1711.05101.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import MOMENTS, Block, State, Step


@register("step")
def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_vectors: bool = False,
) -> Step:
    """AdamW.

    Args:
        betas: decay rates of the two means.
        eps: added to √v̂.
        weight_decay: λ, decoupled.
        decay_vectors: decay 1-D tensors as well.
    """
    first, second = betas
    if not (0.0 <= first < 1.0 and 0.0 <= second < 1.0 and eps >= 0.0 and weight_decay >= 0.0):
        raise ArgumentError(
            f"adamw needs betas in [0, 1), eps >= 0 and weight_decay >= 0, not betas={betas}, eps={eps}, "
            f"weight_decay={weight_decay}"
        )

    def init(block: Block) -> State:
        return {
            role: {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(tensor, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(tensor, memory_format=torch.preserve_format),
            }
            for role, tensor in block.items()
        }

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        return {role: _direction(gradients[role], state[role], parameters[role]) for role in gradients}

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
        kept["exp_avg"].div_(factor)  # p -> c p makes g -> g / c
        kept["exp_avg_sq"].div_(factor * factor)

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
