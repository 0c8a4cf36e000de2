"""LoRA-Pro: move the factors so that what this does to W is as close as possible to a step of full fine-tuning.

A pair of directions moves W by G̃ = s (B d_A + d_B A). With g_B = s G Aᵀ (m, r), g_A = s Bᵀ G (r, n) the ones nearest to G are

    d_A = (BᵀB)⁻¹ g_A / s² + X A          d_B = [I - B (BᵀB)⁻¹ Bᵀ] g_B (A Aᵀ)⁻¹ / s² - B X

for any X (r, r); X is chosen so that (d_A, d_B) stay near (g_A, g_B), by BᵀB X + X A Aᵀ = -(BᵀB)⁻¹ g_A Aᵀ / s². Then
G̃ = G - (I - P_B) G (I - P_A), with the projectors on the columns of B and the rows of A, although G itself is never seen. The
step in W does not depend on how BA was factored, nor on s.

`lora_pro` keeps Adam's moments (m, n) of G̃, takes the direction Z they give for G, and turns it into factor directions:
2mn state numbers per layer, as much as full fine-tuning. `lora_pro_gradient` goes in front of SGD and keeps none. Both cost
O(r²(m + n) + r³) per layer and step, the first also O(rmn). Moments of the factors on top would be a second preconditioner.
It needs the factors' own gradients: after a
perturbation (SAM) g_A is not s Bᵀ G, and the inverse Gram of a small B would blow that up, so the two are not composed.
At B = 0 it is d_A = 0, d_B = g_B (A Aᵀ)⁻¹ / s². Clip behind it where possible; in front of the Adam variant it clips g.

*Differs*: s is the layer's own, a constant in the release; symmetric eigendecompositions solve for X; weight decay is a step of
its own (`decoupled_weight_decay`).

Wang, Liang, He, Wang, Tan: LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, 2024, arXiv:2407.18242.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.step import GRADIENT, MOMENTS, Block, State, Step, on_whole, scale_of, stateless
from rankwise.steps.grams import at_least_single, damped_inverse
from rankwise.steps.moments import adamw

FACTORS = frozenset({"A", "B"})


@register("step")
def lora_pro(*, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, damping: float = 1e-8) -> Step:
    """Adam on the equivalent gradient of W, brought back to B and A; AdamW on whatever else is trained.

    Args:
        betas: decay rates of the two moments.
        eps: ε.
        damping: added to the Gram matrices; 0 takes pseudo-inverses.

    Example:
        >>> rankwise.compose("lora(rank=8) + lora_pro")
    """
    _check(damping)
    adam = adamw(betas=betas, eps=eps)

    def init(block: Block) -> State:
        state = adam.init({role: tensor for role, tensor in block.items() if role not in FACTORS})
        B, A = block["B"], block["A"]
        whole = torch.zeros(B.shape[0], A.shape[1], dtype=at_least_single(B).dtype, device=B.device)  # (m, n)
        return {**state, "B": adam.init({"W": whole})["W"], "A": {"step": torch.zeros((), dtype=torch.float32)}}

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        others = {role: gradient for role, gradient in gradients.items() if role not in FACTORS}
        s, B, A = scale_of(parameters), at_least_single(parameters["B"]), at_least_single(parameters["A"])
        equivalent = equivalent_gradient(B, A, gradients["B"], gradients["A"], s, damping)
        state["A"]["step"] += 1
        Z = adam.update({"W": equivalent}, {"W": state["B"]}, {"W": equivalent})["W"]  # (m, n)
        d_B, d_A = directions(B, A, s * Z @ A.mT, s * B.mT @ Z, s, damping)
        return {**adam.update(others, state, parameters), "B": d_B, "A": d_A}

    return on_whole(Step(init, update, "lora_pro", MOMENTS, FACTORS, preconditions=True, exact=True, plain=adam))


@register("step")
def lora_pro_gradient(*, damping: float = 1e-8) -> Step:
    """The factor gradients whose effect on W is nearest to the full gradient, for a plain SGD behind it.

    Args:
        damping: added to the Gram matrices; 0 takes pseudo-inverses.

    Example:
        >>> rankwise.compose("lora(rank=8) + lora_pro(variant='sgd')")
    """
    _check(damping)

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        B, A = parameters["B"], parameters["A"]
        d_B, d_A = directions(B, A, gradients["B"], gradients["A"], scale_of(parameters), damping)
        return {**gradients, "B": d_B, "A": d_A}

    step = stateless(update, name="lora_pro_gradient", stage=GRADIENT, roles=FACTORS, preconditions=True)
    return on_whole(step._replace(exact=True))


def directions(B: Tensor, A: Tensor, g_B: Tensor, g_A: Tensor, scale: float, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """(d_B (m, r), d_A (r, n)) nearest to (g_B, g_A) among those whose effect on W is nearest to G."""
    B, A, g_B, g_A = (at_least_single(tensor) for tensor in (B, A, g_B, g_A))
    d_B, d_A = _nearest(B, A, g_B, g_A, scale, damping)
    X = sylvester(B.mT @ B, A @ A.mT, -d_A @ A.mT)  # (r, r)
    return d_B - B @ X, d_A + X @ A


def equivalent_gradient(B: Tensor, A: Tensor, g_B: Tensor, g_A: Tensor, scale: float, damping: float = 0.0) -> Tensor:
    """G̃ (m, n), the nearest to G that the factors can reach; the same for every X."""
    B, A, g_B, g_A = (at_least_single(tensor) for tensor in (B, A, g_B, g_A))
    d_B, d_A = _nearest(B, A, g_B, g_A, scale, damping)
    return scale * (B @ d_A + d_B @ A)


def _nearest(B: Tensor, A: Tensor, g_B: Tensor, g_A: Tensor, scale: float, damping: float) -> tuple[Tensor, Tensor]:
    P_inverse, Q_inverse = damped_inverse(B, damping), damped_inverse(A.mT, damping)  # (r, r), (r, r)
    outside = g_B - B @ (P_inverse @ (B.mT @ g_B))  # (m, r)
    return outside @ Q_inverse / scale**2, P_inverse @ g_A / scale**2


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """The X (r, r) with P X + X Q = C for symmetric positive semidefinite P, Q; zero in directions that both lack."""
    p, U = torch.linalg.eigh(P)
    q, V = torch.linalg.eigh(Q)
    sums = p[:, None] + q[None, :]  # (r, r)
    known = sums > torch.finfo(sums.dtype).eps * sums.amax()
    return U @ torch.where(known, (U.mT @ C @ V) / torch.where(known, sums, 1.0), 0.0) @ V.mT


def _check(damping: float) -> None:
    if not damping >= 0.0:
        raise ArgumentError(f"lora_pro: damping is added to a Gram matrix and must not be negative; it is {damping}")
