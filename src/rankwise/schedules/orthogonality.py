"""The orthogonality term of SVD-form adapters, as a gradient.

    R = γ/(2L) Σ over L layers of ‖A Aᵀ - I‖_F + ‖Bᵀ B - I‖_F          A (r, n), B (m, r)

Norms are not squared, so the gradient 2 (A Aᵀ - I) A / ‖A Aᵀ - I‖_F does not fade near the optimum, where it is
taken as 0.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from rankwise.core.sharding import sharded_like, whole
from rankwise.core.step import Block


@torch.no_grad()
def add_orthogonality(blocks: Collection[Block], strength: float) -> None:
    """Adds the gradient of R, with γ = strength, to the `.grad` of every A and B."""
    weight = strength / (2 * max(1, len(blocks)))
    for block in blocks if weight else ():
        _add(block["A"], weight * orthogonality_gradient(whole(block["A"])))
        _add(block["B"], weight * orthogonality_gradient(whole(block["B"]).t()).t())


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """Gradient of ‖rows rowsᵀ - I‖_F, rows (r, n); 0 where they are orthonormal."""
    off = rows @ rows.t() - torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)  # (r, r)
    norm = torch.linalg.matrix_norm(off)
    return torch.zeros_like(rows) if norm == 0 else 2 * (off @ rows) / norm  # (r, n)


def _add(tensor: Tensor, extra: Tensor) -> None:
    extra = sharded_like(extra, tensor)
    tensor.grad = extra.clone() if tensor.grad is None else tensor.grad.add_(extra)
