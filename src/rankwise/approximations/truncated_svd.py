"""The leading singular triplets of a matrix, exactly or by randomized subspace iteration, with fixed signs.

    M ≈ U diag(S) Vh          M (m, n), U (m, r), S (r,) descending, Vh (r, n)

Randomized: a Gaussian sketch Y = M Ω, Ω (n, k), k = r + oversampling, is multiplied by M Mᵀ `iterations` times with a QR in
between, then the small matrix Qᵀ M (k, n) is decomposed exactly. Cost O(m n k · iterations) instead of O(m n min(m, n)). Where
k is half of min(m, n) or more that saves nothing, and the exact way is taken. A triplet's sign is free; here the largest entry
of every left vector is positive.

Halko, Martinsson, Tropp: Finding Structure with Randomness, 2011, arXiv:0909.4061.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import LowRank
from rankwise.core.queries import SVD


def check_rank(rank: int, m: int, n: int) -> None:
    """Refuses ranks that an (m, n) matrix cannot have.

    Raises:
        ArgumentError: rank is not in [1, min(m, n)].
    """
    if not 1 <= rank <= min(m, n):
        raise ArgumentError(f"rank is {rank}, but a matrix of {m}×{n} has ranks 1 to {min(m, n)}; choose one of these")


def truncated_svd(
    matrix: Tensor,
    rank: int,
    *,
    iterations: int | None = None,
    oversampling: int = 10,
    generator: torch.Generator | None = None,
) -> SVD:
    """The `rank` leading triplets of an (m, n) matrix.

    Args:
        matrix: M.
        rank: r, at most min(m, n).
        iterations: subspace iterations of the randomized way; None decomposes exactly.
        oversampling: columns of the sketch beyond r.
        generator: private CPU generator of the sketch; needed for the randomized way.

    Raises:
        ArgumentError: the rank does not fit, or iterations is negative.
        StatisticsError: the matrix holds NaN or infinity.
    """
    m, n = matrix.shape
    check_rank(rank, m, n)
    if iterations is not None and iterations < 0:
        raise ArgumentError(f"iterations is a number of passes, 0 or more, or None for the exact way; not {iterations}")
    if not torch.isfinite(matrix).all():
        raise StatisticsError(
            f"a matrix of {m}×{n} to be decomposed holds NaN or infinity; look at the weight or the probe data"
        )
    width = rank + oversampling
    if iterations is None or 2 * width >= min(m, n):
        return fixed_signs(SVD(*torch.linalg.svd(matrix, full_matrices=False))).truncated(rank)
    if generator is None:
        raise TypeError("the randomized way needs a generator; this is a bug in rankwise")
    sketch = torch.randn(n, width, generator=generator, dtype=torch.float64).to(matrix)  # (n, k)
    Q = torch.linalg.qr(matrix @ sketch)[0]  # (m, k)
    for _ in range(iterations):
        P = torch.linalg.qr(matrix.t() @ Q)[0]  # (n, k)
        Q = torch.linalg.qr(matrix @ P)[0]  # (m, k)
    u, S, Vh = torch.linalg.svd(Q.t() @ matrix, full_matrices=False)  # (k, k), (k,), (k, n)
    return fixed_signs(SVD(Q @ u, S, Vh)).truncated(rank)


def fixed_signs(triplets: SVD) -> SVD:
    """The same decomposition with the largest entry of every left vector positive."""
    signs = column_signs(triplets.U)
    return SVD(triplets.U * signs, triplets.S, triplets.Vh * signs[:, None])


def column_signs(vectors: Tensor) -> Tensor:
    """(k,) signs ±1 of the largest entry of each column of (m, k)."""
    largest = torch.gather(vectors, 0, vectors.abs().argmax(0, keepdim=True)).squeeze(0)  # (k,)
    return torch.where(largest < 0, -torch.ones_like(largest), torch.ones_like(largest))


def plain_start(like: Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """LoRA's own start for an (m, n) matrix, B = 0 and A uniform in ±1/√n: for a layer that has nothing to read."""
    m, n = like.shape
    bound = n**-0.5
    A = (torch.rand(rank, n, generator=generator, dtype=torch.float64) * 2 - 1) * bound  # (r, n)
    return LowRank(like.new_zeros(m, rank), A.to(like))
