"""Fira: GaLore, and the gradient outside its subspace as well, scaled by what Adam does inside.

    R = PᵀG (r, n), N = Adam(R)                                    G (m, n), m < n; mirrored otherwise: Q, rows
    E = G − α P R                 the gradient outside (m, n)      or G − P R
    S = E diag(φ),  φ_j = ‖N_:j‖ / ‖R_:j‖                          or one φ for the whole matrix
    S shortened where ‖S_t‖ > γ ‖S_{t-1}‖                          the norm kept is that of the shortened S
    W <- W − η (α P N + S + λ W)

So the whole gradient is used, with the state of GaLore and one number more: m r for P, 2 n r for the moments, ‖S‖. It costs one
more product O(m n r) per step. The stored norm outlives a change of basis.

Under `alpha_mode="code"`, as in the released runs, α multiplies everything that is projected back, in E too, so that E has a
part inside the subspace; "clean" is the paper's E, orthogonal to P. They agree for α = 1.

It is not a low-rank update; there is nothing to export as LoRA.

*Differs*: N is corrected for the bias of Adam's means before the limiter sees it, not after, which changes S only in the first
steps; a step after one without gradient is not limited.

Chen, Feng, Li, Lai, Yue, Yuan, Wang: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024,
arXiv:2410.01623.
"""

from __future__ import annotations

from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import Piece, register
from rankwise.core.step import Step
from rankwise.steps.growth import amplification, growth_limiter
from rankwise.steps.projection import Projection
from rankwise.steps.projector import inner_steps, projected


@register("step")
def fira(
    *,
    rank: int = 128,
    scale: float = 0.25,
    refresh: int = 200,
    side: str = "std",
    limit: float | None = 1.01,
    scaling: str = "column",
    alpha_mode: str = "code",
    weight_decay: float = 0.0,
    inner: Piece | None = None,
) -> Step:
    """Adam, or another step, inside the leading subspace of the gradient, and the rest of the gradient scaled alike.

    Args:
        rank: r.
        scale: α, factor of the direction inside.
        refresh: steps between two decompositions.
        side: "std" (shorten the shorter dimension), "reverse_std", "left", "right" or "full" (both).
        limit: γ, growth of ‖S‖ allowed per step; None: no limit.
        scaling: "column" (one φ per channel of the longer side) or "matrix".
        alpha_mode: "code" or "clean", see above.
        weight_decay: λ, decoupled, on the whole weight.
        inner: the step run in the subspace, as a piece: `piece(sgd)`; None means AdamW.

    Raises:
        ArgumentError: an unknown choice, or an `inner` that makes no update or decays.

    Example:
        >>> rankwise.compose("full + fira(rank=4, refresh=200)")
    """
    if scaling not in ("column", "matrix") or alpha_mode not in ("code", "clean"):
        raise ArgumentError(
            f'fira: scaling is "column" or "matrix" and alpha_mode "code" or "clean", not {scaling!r} and {alpha_mode!r}'
        )
    if side == "full" and scaling == "column":
        raise ArgumentError('fira: side="full" leaves no channel of W in R (r, r); use scaling="matrix"')
    within, outside = inner_steps("fira", inner, weight_decay)
    taken = scale if alpha_mode == "code" else 1.0

    def residual(G: Tensor, R: Tensor, N: Tensor, projection: Projection) -> Tensor:
        E = G.sub(projection.up(R), alpha=taken)  # (m, n)
        return E.mul_(amplification(R, N, projection, per_channel=scaling == "column"))

    return projected(
        name="fira",
        inner=within,
        rank=rank,
        scale=scale,
        refresh=refresh,
        side=side,
        weight_decay=weight_decay,
        residual=residual,
        limiter=growth_limiter(limit),
        plain=outside,
    )
