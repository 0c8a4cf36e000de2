"""COAP: a gradient projector that follows the momentum by small corrections and is made anew only now and then.

    R = G Qᵀ (m, r), N = Adam(R), W <- W − η (scale · N Q + λ W)          G (m, n), m >= n, Q (r, n); mirrored otherwise
    J(Q) = mean((G QᵀQ − G)²) · (1 − mean_i cos((M Q)_i, G_i))            M (m, r): the first moment, i: rows
    every T steps           Q <- Q − ρ · clip(dJ/dQ)
    every k·T, and first    Y = orth(G Qᵀ), Q = right singular vectors of YᵀG (r, n);   at first Y = orth(G Ω), Ω Gaussian

J is small where Q reproduces the gradient and the momentum points along it. The gradient dJ/dQ is in closed form. Making Q anew
costs O(m n r), with the old Q as the sketch: never a decomposition of G itself. Between, Q drifts off orthonormal rows; nothing
takes it back. State as GaLore: n r for Q and 2 m r for the moments.

`restore=True` carries the moments over: M <- (M Q_old) Q_newᵀ, V <- ((√V Q_old) Q_newᵀ)². An inner step without a first moment
(plain SGD) has M = 0, whose cosine counts as 0: J is then the error of reproduction alone.

It is not a low-rank update. A convolution is projected as the matrix (out, in · kernel).

*Differs*: the left side mirrors the right one exactly, so training Wᵀ gives the transposed result; in the release cosines run
over rows of G on both sides. Convolutions have no Tucker projection here.

Xiao, Sang, Zhi, Liu, Yan, Zhang, Luo, Yuan: COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection, 2024,
arXiv:2412.00071.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, register
from rankwise.core.randomness import generator_for
from rankwise.core.step import Step
from rankwise.steps.bases import Kept, signed
from rankwise.steps.carry import carry_moments, first_moment
from rankwise.steps.grams import at_least_single
from rankwise.steps.projection import Projection
from rankwise.steps.projector import INNER, inner_steps, keep_moments, projected


def objective(Q: Tensor, G: Tensor, M: Tensor) -> Tensor:
    """J () of Q (r, n), G (m, n), M (m, r)."""
    error = (G @ Q.mT @ Q - G).square().mean()
    return error * (1 - torch.nn.functional.cosine_similarity(M @ Q, G, dim=1).mean())


def objective_gradient(Q: Tensor, G: Tensor, M: Tensor) -> Tensor:
    """dJ/dQ (r, n)."""
    R, momentum = G @ Q.mT, M @ Q  # (m, r), (m, n)
    E = R @ Q - G  # (m, n)
    lengths, sizes = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (momentum, G))  # (m, 1)
    seen = (lengths > 0) & (sizes > 0)
    lengths, sizes = torch.where(seen, lengths, 1.0), torch.where(seen, sizes, 1.0)
    cosines = torch.where(seen, (momentum * G).sum(dim=1, keepdim=True) / (lengths * sizes), 0.0)  # (m, 1)
    turns = torch.where(seen, G / sizes - cosines * momentum / lengths, 0.0) / lengths  # (m, n), d cos_i / d (M Q)_i
    of_error = 2.0 / G.numel() * ((E @ Q.mT).mT @ G + R.mT @ E)  # (r, n)
    return (1 - cosines.mean()) * of_error - E.square().mean() * (M.mT @ turns) / len(G)


def sketched_basis(G: Tensor, previous: Tensor | None, rank: int, generator: torch.Generator | None = None) -> Tensor:
    """Nearly the leading right singular vectors of G, as orthonormal rows Q (r, n); exact where G has rank r at most.

    Args:
        G: the gradient (m, n).
        previous: the Q (r, n) in use, which is the sketch; None: a Gaussian one.
        rank: r.
        generator: a CPU generator for the Gaussian sketch.
    """
    G = at_least_single(G)
    if previous is None:
        previous = torch.randn(rank, G.shape[1], generator=generator, dtype=G.dtype).to(G.device)  # (r, n)
    Y = torch.linalg.qr(G @ previous.mT).Q  # (m, r)
    return signed(torch.linalg.svd(Y.mT @ G, full_matrices=False).Vh).contiguous()  # (r, n)


@register("step")
def coap(
    *,
    rank: int = 128,
    scale: float = 1.0,
    refresh: int = 32,
    recompute: int = 5,
    rate: float = 0.1,
    clip: float = 1.0,
    restore: bool = False,
    weight_decay: float = 0.0,
    inner: Piece | None = None,
    seed: int = 0,
) -> Step:
    """Adam, or another step, in a subspace that is corrected by the momentum.

    Args:
        rank: r.
        scale: factor of the projected direction.
        refresh: T, steps between two changes of the basis.
        recompute: k, every so many changes the basis is made anew.
        rate: ρ, of a correction.
        clip: largest norm of dJ/dQ.
        restore: carry the moments over when the basis changes.
        weight_decay: λ, decoupled, on the whole weight.
        inner: the step run in the subspace, as a piece; None means AdamW.
        seed: of the first sketch.

    Raises:
        ArgumentError: a number out of range, or an `inner` that makes no update or decays.

    Example:
        >>> rankwise.compose("full + coap(rank=4)")
    """
    if recompute < 1 or rate < 0.0 or clip <= 0.0:
        raise ArgumentError(f"coap needs recompute >= 1, rate >= 0 and clip > 0, not {recompute}, {rate} and {clip}")
    within, outside = inner_steps("coap", inner, weight_decay)

    def basis(gradient: Tensor, rank: int, side: str, kept: Kept) -> Projection:
        left = side == "left"
        G = gradient.mT if left else gradient  # the right case
        Q = kept["P"].mT if left and "P" in kept else kept.get("Q")
        if Q is None or int(kept["step"]) % (refresh * recompute) == 0:
            Q = sketched_basis(G, Q, rank, generator_for(int(kept["seed"]), "coap"))
        else:
            mean = first_moment(kept, INNER)
            M = G.new_zeros(G.shape[0], rank) if mean is None else mean.mT if left else mean  # (m, r)
            slope = objective_gradient(Q, G, M.to(G.dtype))
            Q = Q - slope * (rate * clip / torch.linalg.vector_norm(slope).clamp_min(clip))
        return Projection(Q.mT.contiguous(), None) if left else Projection(None, Q)

    return projected(
        name="coap",
        inner=within,
        rank=rank,
        scale=scale,
        refresh=refresh,
        weight_decay=weight_decay,
        basis=basis,
        transport=(lambda kept, old, new: carry_moments(kept, old, new, INNER)) if restore else keep_moments,
        plain=outside,
        seed=seed,
    )
