"""ALLoRA: the gradient that reaches an output row of the update is divided by about the square root of that row's norm.

    c_i = 1 / √(‖s (B A)_i‖ + 1/η²)          g_B = diag(c) G Aᵀ          g_A = Bᵀ diag(c) G

with B (m, r), A (r, n), G = dL/dΔ and c (m,) without gradient. At B = 0 every row has c = η, the largest value, so rows leave
zero fast; a large row has c ≈ ‖·‖^-½. g_A cannot be made from LoRA's gradients, so the scaling happens inside backward. Meant
for s = 1 and no dropout, where the forward, the export and the trained numbers are LoRA's; no state; O(r²(m + n)) per forward
for the norms b_i (A Aᵀ) b_iᵀ, and a branch twice as wide in training. With SGD it is a learning rate per row; Adam takes most
of it out of B again, and what remains is the weighting of rows inside g_A.

The layer's input sees the unscaled gradient, unless `scale_input_grad` asks for what a plain hook on the output would do.

*Differs*: the published grid of η² could not be established; 10 is ours. Third-party optimizers that scale g_B alone, or by the
norms of B's rows, are not this method.

Huang, Balestriero: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws, 2024, arXiv:2410.09692.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.gain import Gain
from rankwise.core.operators import LowRank
from rankwise.core.piece import register
from rankwise.core.step import GRADIENT, Block, State, Step, stateless
from rankwise.steps.grams import at_least_single


@register("step")
def allora(*, eta_squared: float = 10.0, scale_input_grad: bool = False) -> Step:
    """Divides the gradient of each output row by √(its norm + 1/η²).

    Args:
        eta_squared: η²; c is at most η.
        scale_input_grad: also scale what the update passes on to the layer's input.

    Example:
        >>> rankwise.compose("lora(rank=8, alpha=8) + sgd + allora(eta_squared=10)")
    """
    if not 0.0 < eta_squared < float("inf"):
        raise ArgumentError(f"allora: eta_squared is η², a positive number, not {eta_squared}")

    def unchanged(gradients: Block, state: State, parameters: Block) -> Block:
        return gradients

    gain = Gain(functools.partial(_rows, eta_squared=eta_squared), scale_input_grad)
    return stateless(unchanged, name="allora", stage=GRADIENT, roles=("A", "B"))._replace(gain=gain)


def _rows(update: LowRank, *, eta_squared: float) -> Tensor:
    return row_coefficients(update.B, update.A, update.scale, eta_squared)


@torch.no_grad()
def row_coefficients(B: Tensor, A: Tensor, scale: float, eta_squared: float) -> Tensor:
    """C (m,) for B (m, r) and A (r, n), without forming their product; in at least float32."""
    B, A = at_least_single(B), at_least_single(A)
    squares = ((B @ (A @ A.mT)) * B).sum(dim=1).clamp_min(0.0)  # ‖(BA)_i‖², rounding can make a zero slightly negative
    return (abs(scale) * squares.sqrt() + 1.0 / eta_squared).rsqrt()
