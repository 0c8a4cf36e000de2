"""The one weighted truncation: the best rank-r product B A in place of D, where inputs do not all count the same.

    min over B (m, r), A (r, n) of ‖(D − B A) F‖_F          D (m, n), F (n, k)

F = I is the plain SVD; F = diag(d) weighs input features (ASVD, FWSVD); F Fᵀ = C = Σ x xᵀ makes the norm the error of the
layer's outputs on the data (SVD-LLM with D = W, EoRA with D = W − W_c). Every square root F of C gives the same B A.

For a fixed orthonormal B the best A is Bᵀ D whatever F is, and the best B are the r leading left vectors U of D F. So

    B A = U Uᵀ D,      ‖(D − B A) F‖² = Σ_{i>r} σ_i(D F)²

holds without inverting F: a Gram matrix from fewer tokens than features (singular C) needs no floor, no damping and no
pseudo-inverse. Where D F has rank q < r, the data do not care about the other r − q directions; they are given to what is left
of D, in the plain norm. That is the limit of an eigenvalue floor going to 0, and r ≥ rank(D) gives B A = D for every F.

*Differs* from the releases, which multiply by the inverse root of a floored or damped C: the same product where C is regular.

Eckart, Young: The approximation of one matrix by another of lower rank, 1936. Yuan et al.: ASVD, 2023, arXiv:2312.05821. Hsu et
al.: Language model compression with weighted low-rank factorization, 2022, arXiv:2207.00112. Wang et al.: SVD-LLM, 2024,
arXiv:2403.07378. Liu et al.: EoRA, 2024, arXiv:2410.21271.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.approximations.truncated_svd import check_rank, column_signs
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import LowRank

SPLITS = ("balanced", "left", "right")


class Truncation(NamedTuple):
    """B A, the singular values σ (k,) of D F, and the squared error Σ_{i>r} σ_i² that this truncation has."""

    factors: LowRank
    spectrum: Tensor
    discarded: float


def weighted_svd(D: Tensor, F: Tensor | None, rank: int, *, gram: bool = False, split: str = "balanced") -> LowRank:
    """The rank-r product B A that minimizes ‖(D − B A) F‖_F.

    Args:
        D: (m, n).
        F: None for the identity, (n,) for a diagonal, (n, k) for a factor; with `gram`, the matrix C = F Fᵀ (n, n).
        rank: r, at most min(m, n).
        gram: F is C = F Fᵀ.
        split: where the singular values of D F go: "balanced" (√ to each factor), "left" (B) or "right" (A; B orthonormal).

    Raises:
        ArgumentError: rank or split do not fit.
        StatisticsError: F does not fit D, or holds NaN, or C has clearly negative eigenvalues.
    """
    return weighted_truncation(D, F, rank, gram=gram, split=split).factors


def weighted_truncation(D: Tensor, F: Tensor | None, rank: int, *, gram: bool = False, split: str = "balanced") -> Truncation:
    """`weighted_svd` with the spectrum and the error that go with it."""
    m, n = D.shape
    check_rank(rank, m, n)
    if split not in SPLITS:
        raise ArgumentError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    product = _times(D, F, gram=gram)  # (m, k)
    if not torch.isfinite(product).all():
        raise StatisticsError(f"a matrix of {m}×{n} or its weights hold NaN or infinity; look at the model and the probe data")
    U, S, _ = torch.linalg.svd(product, full_matrices=False)  # (m, q), (q,)
    threshold = S.max() * torch.finfo(S.dtype).eps * max(product.shape)
    alive = min(int((threshold < S).sum()), rank)
    B, values = U[:, :alive], S[:alive]  # (m, q), (q,)
    if alive < rank:
        B, values = _completed(D, B, values, rank)
    B = B * column_signs(B)
    A = B.t() @ D  # (r, n)
    if split == "balanced":
        root = values.sqrt()
        B, A = B * root, A / root[:, None]
    elif split == "left":
        B, A = B * values, A / values[:, None]
    discarded = float(S[rank:].double().square().sum())
    return Truncation(LowRank(B, A), S, discarded)


def weighted_spectrum(D: Tensor, F: Tensor | None, *, gram: bool = False) -> Tensor:
    """The singular values σ (k,) of D F, descending: Σ_{i>r} σ_i² is the least squared error that any rank r can have."""
    return torch.linalg.svdvals(_times(D, F, gram=gram))


def root_of(gram: Tensor) -> Tensor:
    """A square root F = Q √L (n, n) of a Gram matrix C = Q L Qᵀ, eigenvalues within rounding of 0 set to 0.

    Raises:
        StatisticsError: C is not square, or has eigenvalues too negative to be rounding.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise StatisticsError(f"a Gram matrix is square, but this one has the shape {tuple(gram.shape)}")
    if not torch.isfinite(gram).all():
        raise StatisticsError("a Gram matrix holds NaN or infinity; look at the probe data and at the activations")
    wide = (gram.double() + gram.double().t()) / 2
    values, vectors = torch.linalg.eigh(wide)  # (n,), (n, n)
    lowest, highest = float(values[0]), float(values[-1])
    if lowest < -1e-4 * max(highest, 0.0):
        raise StatisticsError(f"a Gram matrix has eigenvalues from {lowest:.3g} to {highest:.3g}; C = F Fᵀ has none below 0")
    noise = torch.finfo(values.dtype).eps * values.numel() * highest
    return vectors * torch.where(values > noise, values, torch.zeros_like(values)).sqrt()


def _times(D: Tensor, F: Tensor | None, *, gram: bool) -> Tensor:
    """D F (m, k) in D's dtype and on D's device."""
    if F is None:
        return D
    if F.shape[0] != D.shape[1]:
        raise StatisticsError(f"weights for {F.shape[0]} inputs do not fit a matrix with {D.shape[1]} inputs")
    factor = (root_of(F) if gram else F).to(D)
    return D * factor if factor.dim() == 1 else D @ factor


def _completed(D: Tensor, B: Tensor, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Fills B up to r orthonormal columns from what B leaves of D, with their own singular values for the split."""
    U, S, _ = torch.linalg.svd(D - B @ (B.t() @ D), full_matrices=False)
    kept = B.shape[1]
    U, added = U[:, : rank - kept], S[: rank - kept]
    extended, _ = torch.linalg.qr(torch.cat([B, U], dim=1))  # (m, r); what is left of D may not fill the room
    noise = torch.finfo(D.dtype).eps * max(D.shape) * float(D.norm())
    added = torch.where(added > noise, added, torch.ones_like(added))  # a direction without content: all of it in B
    return torch.cat([B, extended[:, kept:]], dim=1), torch.cat([values, added])
