"""Row norms of products of factors, from their r x r Grams, and the variances of noise that follows them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.steps.grams import at_least_single


def product_row_squares(B: Tensor, A: Tensor) -> Tensor:
    """‖(B A)_i‖² (m,) = B_i (A Aᵀ) B_iᵀ."""
    B, A = at_least_single(B), at_least_single(A)
    return ((B @ (A @ A.mT)) * B).sum(1).clamp_min(0.0)


def gradient_row_squares(B: Tensor, A: Tensor, g_B: Tensor, g_A: Tensor) -> Tensor:
    """‖(B g_A + g_B A)_i‖² (m,), as rows of the product (B, g_B) (g_A; A)."""
    left = torch.cat([at_least_single(B), at_least_single(g_B)], dim=1)  # (m, 2r)
    right = torch.cat([at_least_single(g_A), at_least_single(A)], dim=0)  # (2r, n)
    return product_row_squares(left, right)


def row_variances(W_squares: Tensor, BA_squares: Tensor, G_squares: Tensor, n: int, sigma: float, beta: float) -> Tensor:
    """V (m,) = σ²/n (‖W_i‖² + ‖(BA)_i‖² + β ‖G_i‖²), the scale s within BA and G."""
    return (sigma**2 / n) * (W_squares + BA_squares + beta * G_squares)


def kohya_variances(W_squares: Tensor, BA_squares: Tensor, G_squares: Tensor, sigma: float, beta: float) -> Tensor:
    """V (m,) = (σ √(w̄² + ‖(BA)_i‖²) + β ‖G_i‖²)² / m, w̄ the mean of ‖W_i‖."""
    mean = W_squares.sqrt().mean()
    return (sigma * (mean.square() + BA_squares).sqrt() + beta * G_squares).square() / math.prod(W_squares.shape)
