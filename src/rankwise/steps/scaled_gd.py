"""ScaledGD and Riemannian-preconditioned LoRA: each factor's gradient times the inverse Gram of the other factor.

    g_A <- (BᵀB + λI)⁻¹ g_A          g_B <- g_B (AAᵀ + λI)⁻¹

with B (m, r), A (r, n) and r × r inverses. It is gradient descent on the product BA in the metric of factor pairs: the step
does not depend on how BA was factored (exactly so for λ = 0), and on matrix problems it converges at a rate that the
condition number does not enter. With λ > 0 the rank may be larger than the truth's (ScaledGD(λ)). Goes in front of SGD or
AdamW, which then keeps moments of the preconditioned gradient. No state; O(r²(m + n) + r³) per layer and step. At B = 0,
LoRA's start, g_A is zero and stays so. λ = 0 takes the pseudo-inverse: a factor that is zero keeps the other one where it is.

`normalized` divides each inverse by its Frobenius norm (NoRA+), so that the size of the factors drops out; a pair's first
step, when one factor is still zero, is then left as it is. `sequential` moves A first and preconditions B with the moved A,
as the released code does because it holds a reference to A; the default takes both inverses at the same point.

It is not a second-order method: the loss's curvature is not looked at. λ is absolute, not relative to the Gram.

*Differs*: PEFT's port damps with 1e-2, the authors with 1e-6 (the default here); ScaledGD(λ) wants λ near σ_min(M)/20.

Tong, Ma, Chi: Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent, 2020, arXiv:2005.08898.
Xu, Shen, Chi, Ma: The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing, 2023, arXiv:2302.01186. Zhang,
Pilanci: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, 2024, arXiv:2402.02347. Li, Zhang, Mokhtari, He: On
the Crucial Role of Initialization for Matrix Factorization, 2024, arXiv:2410.18965 (`normalized`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import GRADIENT, Block, State, Step, on_whole, stateless
from rankwise.steps.grams import at_least_single, damped_inverse


@register("step")
def scaled_gd(*, damping: float = 1e-6, normalized: bool = False, sequential: bool = False) -> Step:
    """Preconditions the gradients of A and B with the inverse Gram of the other factor.

    Args:
        damping: λ; 0 is plain ScaledGD with pseudo-inverses.
        normalized: divide each inverse by its Frobenius norm (NoRA+).
        sequential: move A before B's preconditioner is taken.

    Example:
        >>> rankwise.compose("lora(rank=8) + sgd + scaled_gd(damping=1e-6)")
    """
    if not damping >= 0.0:
        raise ArgumentError(f"scaled_gd: damping is added to a Gram matrix and must not be negative; it is {damping}")

    def preconditioner(tall: Tensor) -> Tensor:
        inverse = damped_inverse(tall, damping)  # (r, r)
        if not normalized:
            return inverse
        identity = torch.eye(inverse.shape[0], dtype=inverse.dtype, device=inverse.device)
        norm = torch.linalg.matrix_norm(inverse)
        return torch.where(tall.any(), inverse / torch.where(norm > 0, norm, 1.0), identity)

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        changed = dict(gradients)
        if "A" in gradients:
            changed["A"] = preconditioner(parameters["B"]) @ at_least_single(gradients["A"])  # (r, n)
        if "B" in gradients:
            changed["B"] = at_least_single(gradients["B"]) @ preconditioner(parameters["A"].mT)  # (m, r)
        return changed

    step = stateless(update, name="scaled_gd", stage=GRADIENT, roles=("A", "B"), preconditions=True)
    return on_whole(step._replace(order=("A", "B") if sequential else ()))
