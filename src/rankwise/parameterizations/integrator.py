"""What low-rank integrators share: wider bases, moments carried from basis to basis, and the rank to cut to.

Matrices here are small or thin; all is computed in at least float32, and gives the same on every process that puts in the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.core.queries import wide


def basis(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix (m, k), (m, k) again: zeros are behind them where k > m.

    A column that lies in the span of those before it gives an arbitrary direction.
    """
    k = matrix.shape[1]
    Q = torch.linalg.qr(wide(matrix))[0]  # (m, min(m, k))
    return torch.nn.functional.pad(Q, (0, k - Q.shape[1])).to(matrix.dtype)


def fewest(values: Tensor, tolerance: float, *, absolute: bool, least: int, most: int) -> int:
    """How many of the singular values (k,), descending, to keep so that those left out have a norm of at most `tolerance`.

    Args:
        values: d.
        tolerance: a share of ‖d‖, or the norm itself.
        absolute: which of the two.
        least, most: the number is brought into this range, and to k at most.
    """
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # (k,) ‖d_j…‖
    limit = tolerance if absolute else tolerance * tails[0]
    return min(max(int((tails > limit).sum()), least), most, values.shape[0])


def placed(values: Tensor, room: Tensor) -> Tensor:
    """Values in the first places of every dimension of `room`, zeros elsewhere, in its shape and dtype."""
    found = torch.zeros_like(room)
    found[tuple(slice(size) for size in values.shape)] = values.to(room.dtype)
    return found


def multiplied(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """The tensor ×₀ matrices[0] ×₁ matrices[1] …, matrices (new, old); None leaves a mode as it is."""
    for mode, matrix in enumerate(matrices):
        if matrix is not None:
            tensor = (tensor.movedim(mode, -1) @ matrix.mT).movedim(-1, mode)
    return tensor


def turned(tensor: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """The leading part of a tensor, of the matrices' widths, multiplied by them mode by mode and placed in its shape."""
    part = tensor[tuple(slice(None if matrix is None else matrix.shape[1]) for matrix in matrices)]
    return placed(multiplied(part, [matrix if matrix is None else matrix.to(part.dtype) for matrix in matrices]), tensor)
