"""SAM: the gradient is taken at the worst point of a small ball around the weights.

    w    all trained tensors together (for LoRA every B and A, and a head trained beside them)
    g    ∇L(w)
    ε    ρ g / ‖g‖                     one norm over everything, in float32 or wider
    g'   ∇L(w + ε)                     same batch, same dropout masks; the optimizer steps from w with g'

With `adaptive` (ASAM) the ball is measured in units of the weights: ε = ρ T² g / ‖T g‖ with T = diag(|w|), which does not
change when a tensor is rescaled and its partner compensates. A LoRA factor that starts at zero is not moved then.

It is not a penalty: the gradient through ε is dropped. The weights come back from copies, never by subtraction, so ρ = 0 is the
plain optimizer to the bit. Trained numbers and export: those of the parameterization. Cost: a second forward and backward, and
one copy of the trained tensors.

*Differs* from releases: weight decay and moments see w alone, running statistics of normalization layers see the batch once.

Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020,
arXiv:2010.01412. Kwon, Kim, Park, Choi: ASAM, 2021, arXiv:2102.11600.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Perturbation
from rankwise.core.sharding import whole
from rankwise.core.step import Block

_TINY = 1e-12  # keeps a zero gradient from dividing by zero


@register("perturbation")
class SharpnessAware(Perturbation):
    """SAM and ASAM.

    Args:
        rho: ρ, radius of the ball.
        adaptive: measure the ball in units of |w| (ASAM; wants ρ about ten times larger).
    """

    second_pass = True

    def __init__(self, *, rho: float = 0.05, adaptive: bool = False) -> None:
        if rho < 0:
            raise ArgumentError(f"rho is a radius and cannot be negative, it is {rho}")
        self.rho, self.adaptive = rho, adaptive
        self._copies: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def move(self, blocks: Mapping[str, Block], *, learning_rate: float) -> None:
        """Goes from w to w + ε."""
        moved = list(_with_gradients(blocks))
        squares = [_square_norm(gradient * tensor.abs() if self.adaptive else gradient) for tensor, gradient in moved]
        if not squares:
            return
        device = squares[0].device
        norm = torch.stack([square.to(device) for square in squares]).sum().sqrt()  # ()
        factor = float(self.rho / (norm + _TINY))
        self._copies = [(tensor, tensor.detach().clone()) for tensor, _ in moved]
        for tensor, gradient in moved:
            direction = gradient * tensor.square() if self.adaptive else gradient
            tensor.add_(direction.to(tensor.dtype), alpha=factor)

    @torch.no_grad()
    def restore(self, blocks: Mapping[str, Block]) -> None:
        """Copies w back, to the bit."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        self._copies = []


def _with_gradients(blocks: Mapping[str, Block]) -> Iterator[tuple[Tensor, Tensor]]:
    for block in blocks.values():
        for tensor in block.values():
            if tensor.grad is not None:
                yield tensor, tensor.grad


def _square_norm(gradient: Tensor) -> Tensor:
    """‖g‖² of the whole tensor, also where it is sharded."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return whole(wide.square().sum())
