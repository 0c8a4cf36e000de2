"""A frozen linear layer plus an update that is cheaper to make as a matrix, once, than to apply token by token.

    y = (W + update(factors)) x + b

The matrix is made again in backward instead of being kept, and the gradients of the factors come from G = g xᵀ (m, n) by one
backward pass through `update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankwise.core.handwritten import RemadeLinear, Tensors


class RemadeUpdate(RemadeLinear):
    """M = W + update(*factors), or the update alone where there is no W.

    Args:
        update: factors -> matrix (m, n), in ordinary torch.
    """

    def __init__(self, update: Callable[..., Tensor]) -> None:
        self.update = update

    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        matrix = self.update(*factors)
        return (matrix if weight is None else weight + matrix.to(weight.dtype)), None

    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        trained = [factor.requires_grad for factor in factors]
        with torch.enable_grad():
            leaves = [factor.detach().requires_grad_(flag) for factor, flag in zip(factors, trained, strict=True)]
            matrix = self.update(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(matrix, wanted, G.to(matrix.dtype)))
        return tuple(next(found) if flag else None for flag in trained)
