"""Online subspace descent: a gradient projector that learns its basis, one small step of its own per training step.

    R = PᵀG (r, n), N = Adam(R), W <- W − η (scale · P N + λ W)              G (m, n), m < n, P (m, r); mirrored otherwise
    P <- P − η_P · Adam(dL/dP),  L(P) = ‖G' − P PᵀG'‖² + penalty · ‖PᵀP − I‖²,  G' = G/‖G‖
    dL/dP = 2 (K S + S K) P + 4 · penalty · P (PᵀP − I),  S = G'G'ᵀ, K = P Pᵀ − I

P starts at the leading singular vectors of the first gradient; after that nothing is decomposed. The gradient goes down and the
direction comes back through the same P, in which the moments live too, and only then P moves; the moments are not carried
over. η_P is `rate` times how far the learning rate is down its schedule. L makes P orthonormal by itself, in time, but not at
every step. State for m < n: m r for P, 2 n r for the moments, 2 m r for P's Adam (0 with "sgd"). Two products O(m n r) per step
beyond GaLore's two.

It is not a low-rank update.

*Differs*: P's Adam has no weight decay, with which the release shrinks P; P is kept in at least float32.

Liang, Liu, Chen, Liu: Memory-Efficient LLM Training with Online Subspace Descent, 2024, arXiv:2408.12857.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, register
from rankwise.core.step import Block, Step, rates_of
from rankwise.steps.bases import Kept
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.projection import Projection
from rankwise.steps.projector import inner_steps, projected, run_inner

BASIS = "basis."  # prefix of the state of P's own step


def pca_gradient(P: Tensor, G: Tensor, penalty: float = 0.0) -> Tensor:
    """dL/dP (m, r) of P (m, r) and G (m, n), without an (m, m) matrix."""
    size = torch.linalg.vector_norm(G)
    G = G / torch.where(size > 0, size, torch.ones_like(size))
    gram = P.mT @ P  # (r, r)
    gram.diagonal().sub_(1.0)  # PᵀP − I
    seen = G @ (G.mT @ P)  # S P, (m, r)
    slope = 2.0 * (P @ (P.mT @ seen) - seen + seen @ gram)
    return slope.add_(P @ gram, alpha=4.0 * penalty) if penalty else slope


@register("step")
def online_subspace_descent(
    *,
    rank: int = 128,
    scale: float = 0.25,
    interval: int = 200,
    penalty: float = 0.0,
    projector: str = "adamw",
    rate: float | None = None,
    weight_decay: float = 0.0,
    inner: Piece | None = None,
) -> Step:
    """Adam, or another step, in a subspace that is learned online.

    Args:
        rank: r.
        scale: α, factor of the projected direction.
        interval: decides P's rate, 1/interval, unless `rate` is given.
        penalty: weight of ‖PᵀP − I‖².
        projector: the step that moves P, "adamw" or "sgd".
        rate: η_P at the optimizer's initial learning rate; 0 keeps the first basis for ever.
        weight_decay: λ, decoupled, on the whole weight.
        inner: the step run in the subspace, as a piece; None means AdamW.

    Raises:
        ArgumentError: a number out of range, an unknown projector, or an `inner` that makes no update or decays.

    Example:
        >>> rankwise.compose("full + online_subspace_descent(rank=4)")
    """
    if projector not in ("adamw", "sgd") or interval < 1 or penalty < 0.0 or (rate is not None and rate < 0.0):
        raise ArgumentError(
            'online_subspace_descent needs projector "adamw" or "sgd", interval >= 1, penalty >= 0 and rate >= 0, not '
            f"{projector!r}, {interval}, {penalty} and {rate}"
        )
    within, outside = inner_steps("online_subspace_descent", inner, weight_decay)
    mover = adamw() if projector == "adamw" else sgd()
    full_rate = 1.0 / interval if rate is None else rate

    def drift(G: Tensor, projection: Projection, kept: Kept, parameters: Block) -> None:
        left = projection.P is not None
        P = projection.P if projection.P is not None else projection.Q.mT  # type: ignore[union-attr]  # the left case
        now, initial = rates_of(parameters)
        if "initial_rate" not in kept:  # the first step: P is optimal for this very gradient
            kept["initial_rate"] = torch.tensor(initial, dtype=torch.float64)
            kept.update({f"{BASIS}{name}": value for name, value in mover.init({"P": P})["P"].items()})
            return
        initial = float(kept["initial_rate"])
        direction = run_inner(mover, "P", pca_gradient(P, G if left else G.mT, penalty), kept, BASIS)  # (m, r)
        moved = P.sub(direction, alpha=full_rate * (now / initial if initial > 0.0 else 1.0))
        kept["P" if left else "Q"] = moved if left else moved.mT.contiguous()

    return projected(
        name="online_subspace_descent",
        inner=within,
        rank=rank,
        scale=scale,
        refresh=None,
        weight_decay=weight_decay,
        drift=drift,
        plain=outside,
    )
