"""Where the basis of a projected gradient comes from: singular vectors, exact or by a randomized range finder, or a seed.

A basis source is a function (gradient (m, n), rank, side, state) -> `Projection`. It is asked at steps 0, T, 2T, …, or at
every step where the bases are not kept. The counter in the state says which step this is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.steps.grams import at_least_single
from rankwise.steps.projection import Projection
from rankwise.steps.random_projection import derived_seed, projection_of

Kept = dict[str, Tensor]  # the state of one matrix
Basis = Callable[[Tensor, int, str, Kept], Projection]  # (gradient (m, n), rank, side, state) -> new bases


def svd_basis(gradient: Tensor, rank: int, side: str, kept: Kept) -> Projection:
    """The leading singular vectors of the gradient of this very step, in at least float32.

    Their signs are arbitrary and moments outlive a change of basis, so each vector's largest entry is made positive: the
    result then depends neither on the linear algebra library nor on whether W or Wᵀ is trained.
    """
    U, _, Vh = torch.linalg.svd(at_least_single(gradient), full_matrices=False)
    P = signed(U[:, :rank].mT).mT.contiguous() if side in ("left", "full") else None  # (m, r)
    Q = signed(Vh[:rank]).contiguous() if side in ("right", "full") else None  # (r, n)
    return Projection(P, Q)


def signed(rows: Tensor) -> Tensor:
    """The rows (r, k), each with its largest entry positive."""
    return rows * torch.gather(rows, 1, rows.abs().argmax(dim=1, keepdim=True)).sign()


def seeded_basis(refresh: int) -> Basis:
    """Random bases, entries N(0, 1/r), drawn again at every step from the state's seed and the window of `refresh` steps."""

    def basis(gradient: Tensor, rank: int, side: str, kept: Kept) -> Projection:
        seed = derived_seed(int(kept["seed"]), int(kept["step"]) // refresh)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        m, n = gradient.shape
        return projection_of(m, n, rank, seed, device=gradient.device, dtype=wide)

    return basis


def leading_rows(
    matrix: Tensor, rank: int, *, iterations: int, oversampling: int, generator: torch.Generator | None = None
) -> Tensor:
    """Nearly the leading right singular vectors (r, n) of a matrix (m, n), by a randomized range finder with power steps.

        Y = G Ω, Ω (n, r + p) Gaussian;   `iterations` times Y <- orth(G (Gᵀ Y));   the right vectors of orth(Y)ᵀ G

    Each power step squares how much faster the leading directions are found. O(m n (r + p)) per product.
    """
    matrix = at_least_single(matrix)
    m, n = matrix.shape
    width = min(rank + oversampling, m, n)
    start = torch.randn(n, width, generator=generator, dtype=matrix.dtype)  # (n, r + p), on the CPU: the same on any device
    Y = torch.linalg.qr(matrix @ start.to(matrix.device)).Q  # (m, r + p)
    for _ in range(iterations):
        Y = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Y).Q).Q  # orthonormal in between, or small directions drown
    _, _, Vh = torch.linalg.svd(Y.mT @ matrix, full_matrices=False)  # of (r + p, n)
    return signed(Vh[:rank]).contiguous()


def randomized_basis(
    gradient: Tensor,
    rank: int,
    side: str,
    *,
    iterations: int = 2,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> Projection:
    """What `svd_basis` gives, nearly, without a decomposition of the whole gradient.

    Args:
        gradient: G (m, n).
        rank: r.
        side: "left", "right" or "full".
        iterations: power steps.
        oversampling: p, directions drawn beyond the rank.
        generator: a CPU generator for the start.
    """
    options = {"iterations": iterations, "oversampling": oversampling, "generator": generator}
    P = leading_rows(gradient.mT, rank, **options).mT.contiguous() if side in ("left", "full") else None  # (m, r)
    Q = leading_rows(gradient, rank, **options) if side in ("right", "full") else None  # (r, n)
    return Projection(P, Q)
