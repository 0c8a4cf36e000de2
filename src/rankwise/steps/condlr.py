"""CondLR: layers W = U S Vᵀ of fixed rank whose core keeps its condition number within τ, so that they stay robust.

    directions   dU = c (I - U Uᵀ) g_U,  dV = c (I - V Vᵀ) g_V,  dS = g_S          g by autograd: G V Sᵀ, Gᵀ U S, Uᵀ G V
    retraction   U <- orth(U - η dU),  V <- orth(V - η dV)                          U (m, r), V (n, r), S (r, r)
    core         τ = 1: S <- √a Q with a = tr(S Sᵀ)/r;   τ > 1: singular values clamped to [μ - ε, μ + ε], ε = μ (τ - 1)/(τ + 1)

with Q the orthogonal factor of S and μ the mean of its singular values. c stands for (S Sᵀ)⁻¹: 1/a at τ = 1, where that is
what it is, (σ_min/σ_max)² above. With momentum the buffers hold the projected directions. Q and orth are the factors of a QR
with positive diagonal ("qr") or of the polar decomposition ("polar", the nearest ones). τ = inf leaves S alone.

Not a gradient clipping, nor a penalty on the condition number: it holds after every step, to rounding. Weight decay on S works
against it. The clamp acts also on cores that are within τ already. W' = U S Vᵀ starts as the truncated SVD of the weight, which
the first step brings to τ. State: one number per trained number with momentum, none without.

*Differs*: "polar" also for the bases; a head beside the layers takes plain SGD with the same momentum.

Savostianova, Zangrando, Ceruti, Tudisco: Robust low-rank training via approximate orthonormal constraints, 2023,
arXiv:2306.01485.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.sharding import sharded_like, whole
from rankwise.core.step import MOMENTS, Block, State, Step
from rankwise.steps.moments import sgd

ROLES = frozenset({"U", "S", "V"})
RETRACTIONS = ("qr", "polar")


@register("step")
def condlr(*, tau: float = 1.0, retraction: str = "qr", momentum: float = 0.0) -> Step:
    """SGD on U, S, V that keeps bases orthonormal and cond(S) within tau.

    Args:
        tau: τ, 1 or more; at 1 the core stays a multiple of an orthogonal matrix.
        retraction: "qr" or "polar".
        momentum: μ in v <- μ v + d.

    Example:
        >>> rankwise.compose("condlr(compression=0.8, tau=1.5)")
    """
    if not tau >= 1.0:
        raise ArgumentError(f"tau is a condition number, 1 or more, not {tau}")
    if retraction not in RETRACTIONS:
        raise ArgumentError(f"retraction is one of {', '.join(RETRACTIONS)}, not {retraction!r}")
    inner = sgd(momentum=momentum)

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        S = whole(parameters["S"])  # (r, r)
        if tau == 1.0:
            factor = S.shape[0] / S.square().sum()
        else:
            values = torch.linalg.svdvals(S)
            factor = (values[-1] / values[0]).square()
        projected = dict(gradients)
        for role in gradients:
            if role != "S":
                direction = tangent(whole(parameters[role]), whole(gradients[role])) * factor
                projected[role] = sharded_like(direction, parameters[role])
        return inner.update(projected, state, parameters)

    def after(state: State, parameters: Block) -> dict[str, Tensor]:
        for role, moved in parameters.items():
            value = whole(moved)
            if role != "S":
                value = _orthonormal(value, retraction)
            else:
                value = scaled_orthogonal(value, retraction) if tau == 1.0 else clamp_core(value, tau)
            moved.copy_(sharded_like(value, moved))
        return {}

    return Step(inner.init, update, "condlr", MOMENTS, roles=ROLES, plain=inner, after=after, rescaled=inner.rescaled)


def tangent(U: Tensor, dU: Tensor) -> Tensor:
    """(I - U Uᵀ) dU (m, r): what of a direction leaves the span of U."""
    return dU - U @ (U.mT @ dU)


def clamp_core(S: Tensor, tau: float) -> Tensor:
    """S (r, r) with its singular values in [μ - ε, μ + ε], whose ends have the ratio tau."""
    if math.isinf(tau):
        return S
    U, values, Vh = torch.linalg.svd(S)
    mean, share = values.mean(), (tau - 1.0) / (tau + 1.0)
    clamped = torch.minimum(torch.maximum(values, mean * (1.0 - share)), mean * (1.0 + share))  # (r,)
    return (U * clamped) @ Vh


def scaled_orthogonal(S: Tensor, retraction: str = "qr") -> Tensor:
    """The multiple of an orthogonal matrix (r, r) that takes the place of S, with the same mean square singular value."""
    return _orthonormal(S, retraction) * S.square().sum().div(S.shape[0]).sqrt()


def _orthonormal(matrix: Tensor, retraction: str) -> Tensor:
    """Orthonormal columns (m, r) with the span of the matrix."""
    if retraction == "polar":
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U @ Vh
    Q, R = torch.linalg.qr(matrix)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)
