"""Cutting matrices to the singular values that a criterion keeps: a share of the energy, a least value, or a share.

    T(M) = U_r Σ_r V_rᵀ for M = U Σ Vᵀ           M (p, q) or a batch of such

"energy" e keeps the least r with Σ_{i≤r} σ_i² ≥ e Σ σ_i², so that ‖M - T(M)‖² ≤ (1 - e) ‖M‖²; "threshold" t keeps σ_i ≥ t;
"fraction" f keeps ⌈f min(p, q)⌉. T is idempotent at the rank it found. U_r V_rᵀ is a sub-gradient of the nuclear norm at T(M).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError


def kept(S: Tensor, *, energy: float = 0.9, threshold: float | None = None, fraction: float | None = None) -> Tensor:
    """Which of the singular values S (…, k), descending, a criterion keeps: a mask (…, k).

    Raises:
        ArgumentError: two criteria, or one out of range.
    """
    if threshold is not None and fraction is not None:
        raise ArgumentError("give threshold= or fraction=, not both")
    if not 0 < energy <= 1 or (threshold or 0.0) < 0 or not 0 < (1.0 if fraction is None else fraction) <= 1:
        raise ArgumentError(
            f"energy and fraction are in (0, 1] and threshold at least 0; they are {energy}, {fraction} and {threshold}"
        )
    if threshold is not None:
        return threshold <= S
    if fraction is not None:
        count = math.ceil(round(fraction * S.shape[-1], 9))
        return torch.arange(S.shape[-1], device=S.device).expand(S.shape) < count
    squares = S.square()
    rest = squares.flip(-1).cumsum(-1).flip(-1)  # (…, k): what is lost where this value is the first to go
    slack = torch.finfo(S.dtype).eps * S.shape[-1] if energy < 1 else 0.0  # a share that is met is met with rounding
    return rest > (1 - energy + slack) * rest[..., :1]


def cut(matrix: Tensor, **criterion: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """T(M), U_r V_rᵀ and the mask (…, k) of what is kept, of a matrix or a batch. A matrix that keeps all is not touched."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)  # (…, p, k), (…, k), (…, k, q)
    mask = kept(S, **criterion)  # type: ignore[arg-type]
    truncated = (U * (S * mask).unsqueeze(-2)) @ Vh  # (…, p, q)
    whole_rank = mask.all(-1, keepdim=True).unsqueeze(-1)  # (…, 1, 1)
    truncated = torch.where(whole_rank, wide, truncated)
    return truncated.to(matrix.dtype), ((U * mask.unsqueeze(-2)) @ Vh).to(matrix.dtype), mask


def truncate(
    matrix: Tensor, *, energy: float = 0.9, threshold: float | None = None, fraction: float | None = None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """The truncated SVD of a matrix (p, q), or of each in a batch.

    Args:
        matrix: M.
        energy: least share of Σ σ² to keep; not used where one of the others is given.
        threshold: keep σ at least this large.
        fraction: share of min(p, q) to keep, rounded up.

    Returns:
        T(M), the sub-gradient U_r V_rᵀ of its nuclear norm, and r (for a batch a tensor of ranks).
    """
    truncated, subgradient, mask = cut(matrix, energy=energy, threshold=threshold, fraction=fraction)
    ranks = mask.sum(-1)
    return truncated, subgradient, int(ranks) if ranks.dim() == 0 else ranks
