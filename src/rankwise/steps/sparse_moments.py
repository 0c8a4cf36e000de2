"""What a projection loses of the moments, kept at a few places of the matrix: GaLore+'s sparse correction.

    first `warmup` steps   L <- L + |D|,  D = G − back(down(G))                       (m, n)
    then                   Ω = the round(density · m n) largest places of L, fixed;  L is given back
    from there on, at Ω    direction = scale · κ · M_Ω/√V_Ω,  κ = ‖back(N)‖ / ‖M/√V‖

M_Ω, V_Ω are the moments of G itself, kept at Ω: they do not depend on a basis, so a new one does no harm. What comes back from
a subspace is smaller than a step on the whole gradient would be, because a basis spreads it over its entries; κ makes up for
that, with M = back(M_low) and √V = back(√V_low), what the moments in the subspace imply for the whole matrix. A step without
second moments (SGD, with momentum or not) is linear: κ = 1, and the direction at Ω is exact. With density 1 there is nothing to
choose: Ω is everything, from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.step import Step
from rankwise.steps.bases import Kept
from rankwise.steps.carry import first_moment, second_moment
from rankwise.steps.projection import Projection
from rankwise.steps.projector import INNER, Correction, run_inner

SPARSE = "sparse."  # prefix of what is kept at the chosen places


def moments_at_places(
    inner: Step, *, density: float, warmup: int, scale: float, betas: tuple[float, float], eps: float
) -> Correction:
    """The correction of a projected direction.

    Args:
        inner: the step that the projector runs.
        density: share of places; 0: no correction.
        warmup: steps after which they are chosen; with 0 the first gradient decides.
        scale: factor of the direction.
        betas: β₁ and β₂ of the inner step, where it has second moments.
        eps: ε of the inner step.
    """

    def correction(direction: Tensor, G: Tensor, projection: Projection, kept: Kept) -> Tensor:
        count = round(density * G.numel())
        if not count:
            return direction
        if "places" not in kept:
            places = chosen(count, G, projection, kept)
            if places is None:
                return direction
            kept["places"] = places.to(torch.int32 if G.numel() < 2**31 else torch.int64)  # (count,)
            started = inner.init({"weight": G.new_zeros(count)})["weight"]
            kept.update({f"{SPARSE}{key}": value for key, value in started.items()})
        places = kept["places"].long()
        N = run_inner(inner, "weight", G.reshape(-1)[places], kept, SPARSE)  # (count,)
        N = N * (scale * spread(direction, projection, kept))
        return direction.reshape(-1).index_copy_(0, places, N.to(direction.dtype)).reshape(G.shape)

    def spread(direction: Tensor, projection: Projection, kept: Kept) -> Tensor | float:
        """Κ ()."""
        mean, square = first_moment(kept, INNER), second_moment(kept, INNER)
        if mean is None or square is None or not scale:
            return 1.0
        count = float(kept[f"{INNER}step"])
        M = projection.up(mean) / (1.0 - betas[0] ** count)  # (m, n)
        whole = M / (projection.up(square.sqrt()).abs() / (1.0 - betas[1] ** count) ** 0.5 + eps)
        norm = torch.linalg.vector_norm(whole)
        return torch.where(norm > 0, torch.linalg.vector_norm(direction / scale) / norm.clamp_min(1e-30), 1.0)

    def chosen(count: int, G: Tensor, projection: Projection, kept: Kept) -> Tensor | None:
        """The places (count,) in their order; None as long as the warm-up lasts."""
        if count == G.numel():
            return torch.arange(count, device=G.device)
        warming = int(kept["step"]) <= warmup  # the counter says how many steps have begun
        if warming or "lost" not in kept:
            kept["lost"] = (G - projection.up(projection.down(G))).abs_() + kept.get("lost", 0.0)  # (m, n)
        if warming:
            return None
        places = kept["lost"].reshape(-1).topk(count).indices.sort().values
        kept["lost"] = G.new_zeros(0)
        return places

    return correction
