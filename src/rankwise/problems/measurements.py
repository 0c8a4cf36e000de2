"""What is seen of a matrix: linear maps 𝒜 from (m, n) to p numbers, each with its adjoint.

Each is scaled so that ‖𝒜(M)‖² is about ‖M‖² on average; a step size then means the same on every problem. A `LowRank` operand
is measured through its factors where that is cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator

Matrix = Tensor | Operator


def dense(matrix: Matrix) -> Tensor:
    """The matrix itself, (m, n)."""
    return matrix if isinstance(matrix, Tensor) else matrix.dense()


class Measurement(ABC):
    """Interface: a linear map with its adjoint. `count` is p."""

    count: int

    @abstractmethod
    def forward(self, matrix: Matrix) -> Tensor:
        """(m, n) -> the measured numbers."""

    @abstractmethod
    def adjoint(self, values: Tensor) -> Tensor:
        """Measured numbers -> (m, n)."""


class Everything(Measurement):
    """𝒜(M) = s·M R with R (n, n) the symmetric root of the inputs' covariance; None stands for the identity."""

    def __init__(self, m: int, n: int, *, scale: float = 1.0, root: Tensor | None = None) -> None:
        self.count, self.scale, self.root = m * n, scale, root

    def forward(self, matrix: Matrix) -> Tensor:
        """s·M R, (m, n)."""
        seen = dense(matrix) if self.root is None else dense(matrix) @ self.root
        return seen if self.scale == 1.0 else seen * self.scale

    def adjoint(self, values: Tensor) -> Tensor:
        """s·V R, (m, n)."""
        seen = values if self.root is None else values @ self.root
        return seen if self.scale == 1.0 else seen * self.scale


class Stack(Measurement):
    """𝒜(M)_k = ⟨A_k, M⟩ for a stack of matrices A_k (p, m, n), kept as rows (p, m·n)."""

    def __init__(self, matrices: Tensor) -> None:
        self.count, self.shape = matrices.shape[0], matrices.shape[1:]
        self.rows = matrices.reshape(self.count, -1)  # (p, m·n)

    def forward(self, matrix: Matrix) -> Tensor:
        """Inner products, (p,)."""
        return self.rows @ dense(matrix).reshape(-1)

    def adjoint(self, values: Tensor) -> Tensor:
        """Σ v_k A_k, (m, n)."""
        return (values @ self.rows).reshape(self.shape)


class Entries(Measurement):
    """𝒜(M)_k = M[i_k, j_k] / √rate."""

    def __init__(self, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> None:
        if rows.numel() == 0:
            raise ArgumentError(f"no entry of the {shape[0]} × {shape[1]} matrix is observed; raise rate=")
        self.rows, self.columns, self.shape, self.count = rows, columns, shape, rows.numel()
        self.gain = (shape[0] * shape[1] / self.count) ** 0.5

    def forward(self, matrix: Matrix) -> Tensor:
        """The scaled entries, (p,); from factors without the whole matrix."""
        if isinstance(matrix, LowRank):
            pair = matrix.folded()
            seen = (pair.B[self.rows] * pair.A[:, self.columns].mT).sum(dim=1)
        else:
            seen = dense(matrix)[self.rows, self.columns]
        return seen * self.gain

    def adjoint(self, values: Tensor) -> Tensor:
        """The scaled numbers at their places, zeros elsewhere, (m, n)."""
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values * self.gain)


def gaussian(m: int, n: int, count: int, *, symmetric: bool, generator: torch.Generator) -> Stack:
    """Gaussian matrices / √p, symmetrized where asked for."""
    matrices = torch.randn(count, m, n, generator=generator, dtype=torch.float64)  # (p, m, n)
    if symmetric:
        matrices = (matrices + matrices.mT) / 2
    return Stack(matrices / count**0.5)


def random_entries(m: int, n: int, rate: float, *, generator: torch.Generator) -> Entries:
    """Each entry with probability `rate`."""
    chosen = torch.rand(m, n, generator=generator, dtype=torch.float64) < rate
    rows, columns = chosen.nonzero(as_tuple=True)
    return Entries(rows, columns, (m, n))
