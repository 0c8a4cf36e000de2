"""Linear layers between tensors of several modes, with one small matrix per mode: M = M₁ ⊗ M₂ ⊗ … is never formed.

They let a network read and write weight tensors: a kernel of 64 × 64 × 3 × 3 (as 64 × 64 × 9) comes down to 8 × 8 × 1 by three
layers with 5,422 numbers in their matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

DEPTH = 3  # layers of an encoder, and of a decoder
Shape = tuple[int, ...]


class KroneckerLinear(nn.Module):
    """Y = X ×₁ M₁ ×₂ M₂ … + bias, X of shape (n₁, n₂, …), M_k (m_k, n_k), bias (m₁, m₂, …).

    Args:
        inputs, outputs: shapes of X and Y.
        zero: starts at 0 by its last matrix.
        generator: draws the matrices, U(±1/√n_k).
    """

    def __init__(self, inputs: Shape, outputs: Shape, *, zero: bool = False, generator: torch.Generator) -> None:
        super().__init__()
        self.matrices = nn.ParameterList()
        for m, n in zip(outputs, inputs, strict=True):
            self.matrices.append((torch.rand(m, n, generator=generator) * 2 - 1) / math.sqrt(n))  # (m_k, n_k)
        self.bias = nn.Parameter(torch.zeros(outputs))
        if zero:
            nn.init.zeros_(self.matrices[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Y, mode by mode."""
        for mode, matrix in enumerate(self.matrices):
            x = (x.movedim(mode, -1) @ matrix.t()).movedim(-1, mode)
        return x + self.bias


def modes(shape: Shape) -> Shape:
    """The shape with all kernel modes as one; a single number counts as a vector."""
    return shape or (1,) if len(shape) < 4 else (*shape[:2], math.prod(shape[2:]))


def levels_of(shape: Shape, shrink: int) -> list[Shape]:
    """The shape, and what it shrinks to layer by layer, down to the embedding."""
    sizes = [shape]
    for _ in range(DEPTH):
        sizes.append(tuple(max(size // shrink, 1) for size in sizes[-1]))
    return sizes


def stack(levels: Sequence[Shape], draw: torch.Generator, *, first: bool = False) -> nn.Sequential:
    """Kronecker-linear layers from shape to shape with ReLU after each, and before the first one if asked."""
    layers: list[nn.Module] = [nn.ReLU()] if first else []
    for inputs, outputs in itertools.pairwise(levels):
        layers += [KroneckerLinear(inputs, outputs, generator=draw), nn.ReLU()]
    return nn.Sequential(*layers)
