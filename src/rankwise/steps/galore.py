"""GaLore: train the whole weight, but keep Adam's moments in a small subspace of its gradient.

    every `refresh` steps   P = leading r left singular vectors of G (m < n), or Q = leading r right ones (m >= n)
    W <- W - η (scale · P Adam(PᵀG) + λ W)        or  N Q with N = Adam(G Qᵀ);  G (m, n), P (m, r), Q (r, n)

It is the gradient projector with a singular value basis, moments left as they are when the basis changes, and nothing taken
from outside the subspace. Within one window the change of W has rank r at most; over many it is full. State for m <= n: m r
for P and 2 n r for the moments, and two counters, against 2 m n. One singular value decomposition of G per `refresh` steps,
O(m² n), and two products O(m n r) per step. `side="full"` projects on both sides, with moments of r × r.

It is not a low-rank update and has nothing to export as LoRA; the gradient itself stays (m, n). Clipping by the global norm
sees the whole gradient.

*Differs*: singular vectors get fixed signs, arbitrary in the release; decay is `weight_decay` here and acts on the whole W;
the 8-bit and layer-wise variants of the release are left out.

Zhao, Zhang, Chen, Wang, Anandkumar, Tian: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, 2024,
arXiv:2403.03507.
"""

from __future__ import annotations

from rankwise.core.piece import Piece, register
from rankwise.core.step import Step
from rankwise.steps.bases import svd_basis
from rankwise.steps.projector import inner_steps, projected


@register("step")
def galore(
    *,
    rank: int = 128,
    scale: float = 0.25,
    refresh: int = 200,
    side: str = "std",
    weight_decay: float = 0.0,
    inner: Piece | None = None,
) -> Step:
    """Adam, or another step, on the projected gradient of a whole weight.

    Args:
        rank: r.
        scale: α, factor of the projected direction.
        refresh: steps between two decompositions.
        side: "std" (shorten the shorter dimension), "reverse_std", "left", "right" or "full" (both).
        weight_decay: λ, decoupled, on the whole weight.
        inner: the step run in the subspace, as a piece: `piece(sgd)`; None means AdamW.

    Raises:
        ArgumentError: `inner` makes no update, or has a decay, which in the subspace would have no weight to act on.

    Example:
        >>> rankwise.compose("full + galore(rank=4, refresh=200)")
    """
    within, outside = inner_steps("galore", inner, weight_decay)
    return projected(
        name="galore",
        inner=within,
        rank=rank,
        scale=scale,
        refresh=refresh,
        side=side,
        weight_decay=weight_decay,
        basis=svd_basis,
        plain=outside,
    )
