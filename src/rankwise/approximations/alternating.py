"""Alternating least squares: low-rank, masked, Hadamard, Kronecker and Khatri-Rao factorizations of a matrix T (m, n).

    als                  T ≈ B A            min ‖O ∘ (B A - T)‖² + l_B ‖B‖² + l_A ‖A‖², O the observed entries
    hadamard_als         T ≈ (B₁ A₁) ∘ (B₂ A₂)
    nearest_kronecker    T ≈ L ⊗ R          in closed form
    nearest_khatri_rao   T ≈ F_1 ⊙ … ⊙ F_q  column by column; in closed form for q = 2

With one factor fixed the other solves a least-squares problem per row or column, A = (BᵀB + l_A)⁻¹ BᵀT and its mirror image,
so the objective never rises. Plain als tends to the truncated SVD; with one ridge l for both it tends to the singular values
shrunk by l, U (S - l)₊ Vᵀ. Missing entries and Hadamard products weight those problems entry by entry; such objectives have
further minima, so compare tries from several starts by their error on what is observed. A sweep costs
O(mnr + (m + n) r² + r³), masked O(mnr² + (m + n) r³).

Everything is computed in float64 and returned in T's dtype. Where a problem has many solutions and no ridge, the smallest is
taken. *Differs*: norms of Kronecker and Khatri-Rao factors are made equal, which the paper leaves open.

Lu: Low-Rank Approximation, Adaptation, and Other Tales, 2024, arXiv:2408.05883. Van Loan, Pitsianis: Approximation with
Kronecker Products, 1993, for the rearrangement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.approximations.truncated_svd import check_rank, truncated_svd
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import LowRank


def als(
    T: Tensor,
    rank: int,
    *,
    ridge: float | tuple[float, float] = 0.0,
    observed: Tensor | None = None,
    iterations: int = 100,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> LowRank:
    """B (m, r) and A (r, n) with B A near T.

    Args:
        T: the matrix.
        rank: r.
        ridge: l for both factors, or (l_B, l_A).
        observed: (m, n), True where T counts; None for everywhere. Other entries are never read.
        iterations: sweeps at most.
        tolerance: stop where a sweep changes B A by less than this part of its norm.
        generator: private CPU generator of B's start. Default: one seeded with 0.

    Raises:
        ArgumentError: an argument out of range, or a row or column that nothing determines.
        StatisticsError: an entry that counts is NaN or infinite.
    """
    m, n = T.shape
    check_rank(rank, m, n)
    l_B, l_A = ridge if isinstance(ridge, tuple) else (ridge, ridge)
    if min(l_B, l_A) < 0:
        raise ArgumentError(f"ridge is 0 or more, not {ridge}")
    target, weights = _observed(T, observed, needed=min(l_B, l_A) == 0)
    B = _gaussian(T, m, rank, generator)
    A = B.new_zeros(rank, n)
    for _ in range(_checked(iterations, tolerance)):
        last = (B, A)
        A = _solve(B, target, weights, l_A)
        B = _solve(A.t(), target.t(), None if weights is None else weights.t(), l_B).t()
        if tolerance and _settled([last], [(B, A)], tolerance):
            break
    return LowRank(B.contiguous().to(T.dtype), A.contiguous().to(T.dtype))


def hadamard_als(
    T: Tensor,
    rank1: int,
    rank2: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> tuple[LowRank, LowRank]:
    """Two low-rank matrices whose product, entry by entry, is near T; its rank is up to r₁ r₂.

    Args:
        T: the matrix (m, n).
        rank1, rank2: r₁ and r₂.
        iterations, tolerance, generator: as for `als`.

    Raises:
        ArgumentError: an argument out of range.
        StatisticsError: T holds NaN or infinity.
    """
    m, n = T.shape
    for rank in (rank1, rank2):
        check_rank(rank, m, n)
    target, _ = _observed(T, None, needed=False)
    generator = generator or torch.Generator().manual_seed(0)
    pairs = [(_gaussian(T, m, rank, generator), _gaussian(T, n, rank, generator).t()) for rank in (rank1, rank2)]
    for _ in range(_checked(iterations, tolerance)):
        last = list(pairs)
        for k in (0, 1):
            other = pairs[1 - k][0] @ pairs[1 - k][1]  # (m, n), fixed: its squares are the weights
            weighted, weights = other * target, other.square()
            B, A = pairs[k][0], _solve(pairs[k][0], weighted, weights, 0.0)
            B = _solve(A.t(), weighted.t(), weights.t(), 0.0).t()
            pairs[k] = (B, A)
        if tolerance and _settled(last, pairs, tolerance):
            break
    first, second = (LowRank(B.contiguous().to(T.dtype), A.contiguous().to(T.dtype)) for B, A in pairs)
    return first, second


def nearest_kronecker(T: Tensor, left_shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """L (m₁, n₁) and R (m/m₁, n/n₁) with L ⊗ R nearest to T: the rank-1 part of T with its blocks as rows.

    Raises:
        ArgumentError: left_shape does not divide T's.
    """
    (m, n), (m1, n1) = T.shape, left_shape
    if m1 < 1 or n1 < 1 or m % m1 or n % n1:
        raise ArgumentError(f"left_shape is {m1}×{n1}, which does not divide a matrix of {m}×{n} into equal blocks")
    m2, n2 = m // m1, n // n1
    blocks = T.double().reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
    U, S, Vh = truncated_svd(blocks, 1)
    left, right = U[:, 0] * S[0].sqrt(), Vh[0] * S[0].sqrt()
    return left.reshape(m1, n1).to(T.dtype), right.reshape(m2, n2).to(T.dtype)


def nearest_khatri_rao(
    T: Tensor, sizes: Sequence[int], *, iterations: int = 100, tolerance: float = 1e-12
) -> tuple[Tensor, ...]:
    """F_i (m_i, n) with F_1 ⊙ … ⊙ F_q nearest to T; each column is a tensor (m_1, …, m_q) of rank one.

    For more than two factors the nearest is not known in closed form: higher-order power iteration from the leading vectors of
    each unfolding, which never gets worse but may end in a local optimum.

    Args:
        T: the matrix (m, n).
        sizes: m_1 … m_q, which multiply to m.
        iterations: of the power iteration at most; not used for two factors.
        tolerance: stop where the sizes of all columns change by less than this part.

    Raises:
        ArgumentError: the sizes do not multiply to m.
        StatisticsError: T holds NaN or infinity.
    """
    m, n = T.shape
    if len(sizes) < 1 or min(sizes) < 1 or math.prod(sizes) != m:
        raise ArgumentError(f"sizes {tuple(sizes)} multiply to {math.prod(sizes)}, not to the {m} rows of the matrix")
    target, _ = _observed(T, None, needed=False)
    columns = target.t().reshape(n, *sizes)  # (n, m_1, …, m_q)
    count = len(sizes)
    vectors = [_leading(columns, k) for k in range(count)]  # (n, m_k), unit
    norms = columns.new_zeros(n)
    for _ in range(_checked(iterations, tolerance) if count > 2 else 1):
        last = norms
        for k in range(count):
            moved = _contracted(columns, vectors, k)  # (n, m_k)
            norms = moved.norm(dim=1)
            vectors[k] = torch.where(norms[:, None] > 0, moved / norms.clamp_min(1e-300)[:, None], vectors[k])
        if (norms - last).norm() <= tolerance * norms.norm():
            break
    scale = norms.pow(1 / count)[:, None]
    return tuple((vector * scale).t().contiguous().to(T.dtype) for vector in vectors)


def _leading(columns: Tensor, k: int) -> Tensor:
    """(n, m_k): the leading left singular vector of each column's unfolding in mode k."""
    unfolded = columns.movedim(k + 1, 1).flatten(2)  # (n, m_k, the rest)
    return torch.linalg.svd(unfolded, full_matrices=False)[0][:, :, 0]


def _contracted(columns: Tensor, vectors: Sequence[Tensor], k: int) -> Tensor:
    """(n, m_k): each column's tensor times the vectors of all other modes."""
    tensor = columns
    for mode in reversed([mode for mode in range(len(vectors)) if mode != k]):  # the last first, so that numbers stay right
        moved = tensor.movedim(mode + 1, -1)
        tensor = (moved * vectors[mode].reshape(len(moved), *(1 for _ in moved.shape[2:]), -1)).sum(-1)
    return tensor


def _observed(T: Tensor, observed: Tensor | None, *, needed: bool) -> tuple[Tensor, Tensor | None]:
    """T in float64 with zeros where nothing is observed, and the mask as weights."""
    if observed is None:
        target = T.double()
    else:
        if observed.shape != T.shape or observed.dtype is not torch.bool:
            raise ArgumentError(
                f"observed is a mask of True and False as large as the matrix, {tuple(T.shape)}; this is "
                f"{tuple(observed.shape)} of {observed.dtype}"
            )
        for axis, side in ((1, "row"), (0, "column")):
            empty = (~observed.any(axis)).nonzero().flatten().tolist()
            if empty and needed:
                raise ArgumentError(
                    f"nothing is observed in {side} {empty[0]} ({len(empty)} such), so nothing determines it; leave it out, or "
                    "give a ridge above 0, which makes it zero"
                )
        target = torch.where(observed, T, torch.zeros_like(T)).double()
    if not torch.isfinite(target).all():
        raise StatisticsError(f"the matrix of {tuple(T.shape)} to be factorized holds NaN or infinity where it counts")
    return target, None if observed is None else observed.double()


def _gaussian(T: Tensor, size: int, rank: int, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randn(size, rank, generator=generator, dtype=torch.float64).to(T.device)


def _checked(iterations: int, tolerance: float) -> int:
    if iterations < 1 or tolerance < 0:
        raise ArgumentError(f"iterations is at least 1 and tolerance 0 or more, not {iterations} and {tolerance}")
    return iterations


def _solve(D: Tensor, target: Tensor, weights: Tensor | None, ridge: float) -> Tensor:
    """X (r, n) that minimizes Σ w_ij (D X - T)²_ij + ridge ‖X‖², where `target` is w ∘ T already and D is (m, r)."""
    m, r = D.shape
    eye = torch.eye(r, dtype=D.dtype, device=D.device)
    if weights is None:
        return _inverse(D.t() @ D + ridge * eye, ridge) @ (D.t() @ target)
    squares = (D[:, :, None] * D[:, None, :]).reshape(m, r * r)
    grams = (weights.t() @ squares).reshape(-1, r, r) + ridge * eye  # (n, r, r): one per column
    return (_inverse(grams, ridge) @ (D.t() @ target).t()[:, :, None]).squeeze(-1).t()


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    """The inverse of Gram matrices; without ridge the pseudo-inverse, which takes the smallest of many solutions."""
    return torch.linalg.inv(gram) if ridge else torch.linalg.pinv(gram, hermitian=True)


def _settled(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> bool:
    """Whether the product of the pairs, entry by entry, has stopped moving."""
    old = torch.stack([B @ A for B, A in before]).prod(0)
    new = torch.stack([B @ A for B, A in after]).prod(0)
    return bool((new - old).norm() <= tolerance * new.norm())
