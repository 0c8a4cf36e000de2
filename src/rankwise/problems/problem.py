"""A low-rank matrix problem with a known answer: minimize L(M) over M = B A of a given rank.

    squares:   L(M) = ½ ‖𝒜(M) - y‖²          G = 𝒜*(𝒜(M) - y)
    absolute:  L(M) = ‖𝒜(M) - y‖₁ / √p       G = 𝒜*(sign(𝒜(M) - y)) / √p

A solver sees only L and G = dL/dM, and the factors' gradients are G Aᵀ (m, r) and Bᵀ G (r, n); the truth is for the trace
alone. A symmetric problem is solved with A = Xᵀ, B = X; the literature's f(X) = ¼ ‖𝒜(XXᵀ) - y‖² has the gradient G X, which
is that of B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.randomness import generator_for
from rankwise.problems.measurements import Everything, Matrix, Measurement, dense

LOSSES = ("squares", "absolute")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One instance.

    Attributes:
        name: kind and sizes, for messages and tables.
        measurement: 𝒜.
        observed: y, what 𝒜 (and noise) gave.
        truth: M* (m, n).
        rank: r* of the truth.
        symmetric: whether M* and every gradient are symmetric, and M* positive semidefinite.
        noise: standard deviation of the noise in y.
        loss_kind: "squares" or "absolute".
    """

    name: str
    measurement: Measurement
    observed: Tensor
    truth: Tensor
    rank: int
    symmetric: bool = False
    noise: float = 0.0
    loss_kind: str = "squares"

    def __post_init__(self) -> None:
        if self.loss_kind not in LOSSES:
            raise ArgumentError(f"loss_kind is one of {', '.join(LOSSES)}, not {self.loss_kind!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.truth.shape
        return m, n

    @property
    def noise_floor(self) -> float:
        """The relative error that noise alone leaves: σ √(degrees of freedom) / ‖M*‖."""
        return self.noise * self.degrees_of_freedom(self.rank) ** 0.5 / float(torch.linalg.matrix_norm(self.truth))

    def degrees_of_freedom(self, rank: int) -> int:
        """r(m + n - r), or r n - r(r - 1)/2 for symmetric matrices; fewer measurements than these cannot suffice."""
        m, n = self.shape
        return rank * n - rank * (rank - 1) // 2 if self.symmetric else rank * (m + n - rank)

    def loss(self, matrix: Matrix) -> Tensor:
        """L(M), 0-d."""
        residual = self.measurement.forward(matrix) - self.observed
        if self.loss_kind == "absolute":
            return residual.abs().sum() / self.measurement.count**0.5
        return 0.5 * (residual * residual).sum()

    def gradient(self, matrix: Matrix) -> Tensor:
        """G = dL/dM, (m, n)."""
        residual = self.measurement.forward(matrix) - self.observed
        if self.loss_kind == "absolute":
            gradient = self.measurement.adjoint(residual.sign()) / self.measurement.count**0.5
        else:
            gradient = self.measurement.adjoint(residual)
        return (gradient + gradient.mT) / 2 if self.symmetric else gradient

    def gradient_at_zero(self) -> Tensor:
        """G at M = 0; minus it is what spectral, Nyström and one-step starts are made of."""
        return self.gradient(torch.zeros_like(self.truth))

    def relative_error(self, matrix: Matrix) -> float:
        """‖M - M*‖ / ‖M*‖."""
        return float(torch.linalg.matrix_norm(dense(matrix) - self.truth) / torch.linalg.matrix_norm(self.truth))

    def best_error(self, rank: int) -> float:
        """The relative error of the best matrix of this rank (Eckart-Young)."""
        values = torch.linalg.svdvals(self.truth)
        return float(values[rank:].norm() / values.norm())

    def isometry_defect(self, rank: int, *, draws: int = 200, seed: int = 0) -> float:
        """Largest |‖𝒜(M)‖² - 1| over random unit matrices of rank 2r: a lower estimate of the restricted isometry constant."""
        generator = generator_for(seed, "isometry")
        m, n = self.shape
        worst = 0.0
        for _ in range(draws):
            left = torch.randn(m, 2 * rank, generator=generator, dtype=self.truth.dtype)
            right = torch.randn(2 * rank, n, generator=generator, dtype=self.truth.dtype)
            matrix = left @ (left.mT if self.symmetric else right)
            seen = self.measurement.forward(matrix / torch.linalg.matrix_norm(matrix))
            worst = max(worst, abs(float((seen * seen).sum()) - 1.0))
        return worst


def factorizing(matrix: Matrix, *, rank: int | None = None, symmetric: bool | None = None) -> Problem:
    """The problem of factorizing a given matrix (m, n), ½ ‖BA - M‖².

    Args:
        matrix: M.
        rank: r* where it is known; default: the numerical rank.
        symmetric: look for X Xᵀ; default: if M is symmetric and has no negative eigenvalue beyond rounding.

    Raises:
        ArgumentError: symmetric is asked for and the matrix is not.
    """
    truth = dense(matrix).detach()
    m, n = truth.shape
    rounding = 8 * torch.finfo(truth.dtype).eps * float(truth.norm())  # a product X Xᵀ may miss symmetry by its last digits
    can = m == n and torch.allclose(truth, truth.mT, rtol=0.0, atol=rounding) and _no_negative_eigenvalue(truth)
    if symmetric and not can:
        raise ArgumentError(f"this {m} × {n} matrix is not symmetric and positive semidefinite; use symmetric=False")
    known = int(torch.linalg.matrix_rank(truth)) if rank is None else rank
    return Problem(
        name=f"factorization of {m} × {n}",
        measurement=Everything(m, n),
        observed=truth,
        truth=truth,
        rank=known,
        symmetric=can if symmetric is None else symmetric,
    )


def _no_negative_eigenvalue(matrix: Tensor) -> bool:
    values = torch.linalg.eigvalsh(matrix)
    return bool(values[0] >= -1e-10 * values.abs().amax())
