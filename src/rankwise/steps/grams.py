"""Small r × r matrices of a pair of factors: Grams, their damped or pseudo inverses, and their geometric mean.

All of it is computed in at least float32, and nothing here asks the device for a number, so a GPU is not made to wait.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it has fewer bits; a Gram matrix squares the condition number."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def damped_inverse(tall: Tensor, damping: float) -> Tensor:
    """(FᵀF + λI)⁻¹ for F (k, r); with λ = 0 the pseudo-inverse, so that directions F does not have are left at zero.

    Both come from the singular values of F itself, which keeps the digits that forming FᵀF would lose.
    """
    factor = at_least_single(tall)
    # A QR first: the decomposition that costs then is of an (r, r) matrix, however tall F is.
    small = torch.linalg.qr(factor, mode="r").R if factor.shape[0] > factor.shape[1] else factor  # (<= r, r)
    _, values, Vh = torch.linalg.svd(small, full_matrices=damping > 0.0)
    squares = values.square()
    if damping > 0.0:
        missing = torch.zeros(Vh.shape[0] - squares.shape[0], dtype=squares.dtype, device=squares.device)
        inverse = 1.0 / (torch.cat([squares, missing]) + damping)  # (r,)
    else:
        cut = torch.finfo(values.dtype).eps ** 0.75 * values.amax()  # about 1e-12 in float64
        kept = values > cut
        inverse = torch.where(kept, 1.0 / torch.where(kept, squares, 1.0), 0.0)
    return (Vh.mT * inverse) @ Vh  # (r, r)


def geometric_mean(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """The S > 0 with S P S = Q, and its inverse, for symmetric positive definite P, Q (r, r).

    With P = V D² Vᵀ and K = D Vᵀ Q V D = U L² Uᵀ it is S = V D⁻¹ U L Uᵀ D⁻¹ Vᵀ.
    """
    tiny = torch.finfo(P.dtype).eps
    values, V = torch.linalg.eigh(P)
    root = values.clamp_min(0.0).sqrt() + tiny  # (r,), rounding can make an eigenvalue slightly negative
    half = V * root  # V D
    values, U = torch.linalg.eigh(half.mT @ Q @ half)
    middle = values.clamp_min(0.0).sqrt() + tiny  # L, (r,)
    left, right = (V / root) @ U, half @ U
    return (left * middle) @ left.mT, (right / middle) @ right.mT
