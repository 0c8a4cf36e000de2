"""Adafactor's preconditioner: second moments of a matrix from its row and column means, and a clip of the step's size.

    ρ_t = t^γ (γ < 0)     R <- (1 - ρ) R + ρ mean_j G²     C <- (1 - ρ) C + ρ mean_i G²     V = R Cᵀ / mean(R)
    U = G / √V            U / max(1, rms(U) / d)

G is (m, n), R (m,), C (n,); tensors of another number of dimensions keep V whole. State m + n instead of m n. There is no bias
correction: ρ_1 = 1, so the first V is G² itself.

Shazeer, Stern: Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018, arXiv:1804.04235.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY, LEAST = 1e-30, 1e-3  # added to squares; the smallest size of a weight that a step is taken relative to
Kept = dict[str, Tensor]  # the state of one tensor


def second_moments(tensor: Tensor, like: Tensor) -> Kept:
    """The state for a tensor, in the dtype of an empty tensor `like`."""
    if tensor.dim() == 2:
        return {"exp_avg_sq_row": like.new_zeros(tensor.shape[0]), "exp_avg_sq_col": like.new_zeros(tensor.shape[1])}
    return {"exp_avg_sq": like.new_zeros(tuple(tensor.shape))}


def preconditioned(G: Tensor, kept: Kept, count: float, decay_rate: float) -> Tensor:
    """U at step `count`, the first being 1; moves the second moments on."""
    share, square = count**decay_rate, G * G + TINY
    if G.dim() != 2:
        return G * kept["exp_avg_sq"].lerp_(square, share).rsqrt()
    rows = kept["exp_avg_sq_row"].lerp_(square.mean(dim=1), share)  # (m,)
    columns = kept["exp_avg_sq_col"].lerp_(square.mean(dim=0), share)  # (n,)
    return G * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()  # (m, n)


def rms(tensor: Tensor) -> Tensor:
    """Root mean square, 0-d."""
    return torch.linalg.vector_norm(tensor) / max(1, tensor.numel()) ** 0.5


def clipped(U: Tensor, limit: float) -> Tensor:
    """U, made shorter where its root mean square is above the limit."""
    return U / (rms(U) / limit).clamp_min(1.0)
