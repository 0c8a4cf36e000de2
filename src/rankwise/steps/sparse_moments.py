"""Moments of the whole gradient at the few places of a matrix where its projection loses most: GaLore+'s sparse correction.

    first `warmup` steps   L <- L + |G − back(down(G))|          (m, n)
    then                   Ω = the round(density · m n) largest places of L, fixed;  L is given back
    from there on          direction at Ω = scale · the inner step on G[Ω], whose moments begin here

With density 1 there is nothing to choose: Ω is everything, from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.step import Step
from rankwise.steps.bases import Kept
from rankwise.steps.projection import Projection
from rankwise.steps.projector import Correction, run_inner

SPARSE = "sparse."  # prefix of the inner step's state at the chosen places


def moments_at_places(inner: Step, *, density: float, warmup: int, scale: float) -> Correction:
    """The correction of a projected direction.

    Args:
        inner: the step that the projector runs.
        density: share of places; 0: no correction.
        warmup: steps after which they are chosen; with 0 the first gradient decides.
        scale: factor of the direction.
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
        N = run_inner(inner, "weight", G.reshape(-1)[places], kept, SPARSE)
        return direction.reshape(-1).index_copy_(0, places, N.mul(scale).to(direction.dtype)).reshape(G.shape)

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
