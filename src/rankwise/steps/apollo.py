"""APOLLO: the raw gradient, scaled per channel as a small Adam on a random projection of it would have been.

    R = PᵀG (r, n), N = Adam(R)                            G (m, n), m < n, P (m, r) with entries N(0, 1/r); mirrored otherwise
    U = √scale · G diag(s),  s_j = ‖N_:j‖ / ‖R_:j‖         or one s for the whole matrix ("tensor", with r = 1: APOLLO-Mini)
    U shortened where ‖U_t‖ > γ ‖U_{t-1}‖                  W <- W − η (U + λ W)

A random projection keeps the norm of a channel to a relative deviation √(2/r) of its square, and only norms are used, so r can
be tiny. P is drawn again every `refresh` steps from a seed, made anew at every step and never kept; the moments stay as they
are. State for m < n: 2 n r for the moments, the seed and ‖U‖; 2 n for Mini. One product O(m n r) per step. `basis="svd"` takes
leading singular vectors instead, keeps them (m r) and decomposes G at each refresh.

A channel always moves against its own gradient: there is momentum in how far, but not in which direction. It is no low-rank
update and has nothing to export as LoRA.

*Differs*: N is corrected for the bias of Adam's means before the limiter sees it, not after, which changes U only in the first
steps; a step after one without gradient is not limited. `scale_front` decides, as in the release, whether √scale is applied
before the limiter or after; since the limiter compares norms of one kind, that changes the norm kept and not U.

Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang, Lee: APOLLO: SGD-like Memory, AdamW-level Performance, 2024,
arXiv:2412.05270.
"""

from __future__ import annotations

import math

from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, register
from rankwise.core.step import Step
from rankwise.steps.bases import Kept, seeded_basis, svd_basis
from rankwise.steps.growth import amplification, growth_limiter
from rankwise.steps.projection import Projection
from rankwise.steps.projector import inner_steps, projected


@register("step")
def apollo(
    *,
    rank: int = 128,
    scale: float = 1.0,
    refresh: int = 200,
    granularity: str = "channel",
    limit: float | None = 1.01,
    scale_front: bool = False,
    basis: str = "random",
    weight_decay: float = 0.0,
    inner: Piece | None = None,
    seed: int = 0,
) -> Step:
    """Scales the gradient of a whole weight by what Adam does to a random projection of it.

    Args:
        rank: r.
        scale: its square root multiplies U; about (smaller side)/r makes up for a small rank.
        refresh: steps between two projections.
        granularity: "channel" (one s per channel of the longer side) or "tensor".
        limit: γ, growth of ‖U‖ allowed per step; None: no limit.
        scale_front: apply √scale before the limiter.
        basis: "random" or "svd".
        weight_decay: λ, decoupled, on the whole weight.
        inner: the step whose effect is measured, as a piece; None means AdamW.
        seed: of the random projections.

    Raises:
        ArgumentError: an unknown choice, a negative scale, or an `inner` that makes no update or decays.

    Example:
        >>> rankwise.compose("full + apollo(rank=4)")
    """
    if granularity not in ("channel", "tensor") or basis not in ("random", "svd") or scale < 0.0:
        raise ArgumentError(
            'apollo: granularity is "channel" or "tensor", basis "random" or "svd" and scale >= 0, not '
            f"{granularity!r}, {basis!r} and {scale}"
        )
    within, outside = inner_steps("apollo", inner, weight_decay)
    limiter, root = growth_limiter(limit), math.sqrt(scale)
    before, after = (root, 1.0) if scale_front else (1.0, root)

    def residual(G: Tensor, R: Tensor, N: Tensor, projection: Projection) -> Tensor:
        return G * (amplification(R, N, projection, per_channel=granularity == "channel") * before)  # (m, n)

    def limited(U: Tensor, kept: Kept) -> Tensor:
        return limiter(U, kept) * after

    return projected(
        name="apollo",
        inner=within,
        rank=rank,
        scale=None,
        refresh=refresh,
        weight_decay=weight_decay,
        basis=seeded_basis(refresh) if basis == "random" else svd_basis,
        stored=basis == "svd",
        residual=residual,
        limiter=limited,
        plain=outside,
        seed=seed if basis == "random" else None,
    )
