"""Steps up the linearized loss: the largest gᵀ C ε on the ball ‖D⁻¹ ε‖ <= ρ over all tensors together, C and D diagonal.

    ε = ρ D (D C g) / ‖D C g‖           C -> cC changes nothing; ‖D⁻¹ ε‖ = ρ

Norms are taken in float32 or wider, and over whole tensors where these are sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rankwise.core.sharding import whole
from rankwise.core.step import Block
from rankwise.perturbations.averages import wide

Diagonal = Sequence[Tensor] | None
_TINY = 1e-12  # keeps a zero gradient from dividing by zero


def total(numbers: Iterable[Tensor]) -> Tensor:
    """Σ of numbers () that may lie on several devices."""
    listed = list(numbers)
    return torch.stack([number.to(listed[0].device) for number in listed]).sum()


def square_norm(tensor: Tensor) -> Tensor:
    """‖g‖² of the whole tensor, also where it is sharded."""
    return whole(wide(tensor).square().sum())


def perturbation_of(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], C: Diagonal, D: Diagonal, rho: float
) -> list[Tensor]:
    """ε = ρ D (D C g) / ‖D C g‖ in the shapes and dtypes of the weights; None for a diagonal means I."""
    factor, directions = scaled(gradients, C, D, rho)
    return [(direction * factor).to(tensor.dtype) for direction, tensor in zip(directions, weights, strict=True)]


def scaled(ascent: Sequence[Tensor], C: Diagonal, D: Diagonal, rho: float) -> tuple[float, Iterator[Tensor]]:
    """ρ / ‖D C h‖ and D² C h."""
    ascent = ascent if C is None else [h * c for h, c in zip(ascent, C, strict=True)]
    pairs = list(zip(ascent, [None] * len(ascent) if D is None else D, strict=True))
    norm = total(square_norm(h if d is None else h * d) for h, d in pairs).sqrt()  # ()
    return float(rho / (norm + _TINY)), (h if d is None else h * d.square() for h, d in pairs)


def with_gradients(blocks: Mapping[str, Block], roles: frozenset[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """("site.role", tensor, gradient) of the tensors of these roles, or of all."""
    for site, block in blocks.items():
        for role, tensor in block.items():
            if tensor.grad is not None and (not roles or role in roles):
                yield f"{site}.{role}", tensor, tensor.grad
