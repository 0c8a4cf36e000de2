"""Fira's scale for what lies outside a subspace, and the limit on its growth; APOLLO uses both for the whole gradient.

    φ_j = ‖N_:j‖ / ‖R_:j‖                         how much the inner step amplifies channel j of the small gradient R
    ‖S_t‖ <= γ ‖S_{t-1}‖                          S_t is shortened where it is longer; the norm kept is the shortened one

Channels run along the side that is not projected: columns for R = PᵀG (r, n), rows for R = G Qᵀ (m, r).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.steps.bases import Kept
from rankwise.steps.projection import Projection

Limiter = Callable[[Tensor, Kept], Tensor]  # (residual direction, state) -> the same, held back

TINY = 1e-8  # beside ‖R_:j‖, so that a channel without gradient divides by something


def amplification(R: Tensor, N: Tensor, projection: Projection, *, per_channel: bool) -> Tensor:
    """φ (1, n) or (m, 1) per channel, or () for the whole matrix."""
    if not per_channel:
        return torch.linalg.vector_norm(N) / (torch.linalg.vector_norm(R) + TINY)
    dim = 1 if projection.P is None else 0
    return torch.linalg.vector_norm(N, dim=dim, keepdim=True) / (torch.linalg.vector_norm(R, dim=dim, keepdim=True) + TINY)


def no_limit(residual: Tensor, kept: Kept) -> Tensor:
    """Lets the residual grow as it will."""
    return residual


def growth_limiter(limit: float | None) -> Limiter:
    """Holds back a direction that grows by more than γ from one step to the next; keeps its norm as "residual_norm" ().

    Args:
        limit: γ; None or infinity: no limit.

    Raises:
        ArgumentError: a γ below 1, under which a direction could never recover.
    """
    if limit is None or limit == float("inf"):
        return no_limit
    if not limit >= 1.0:
        raise ArgumentError(f"limit is the growth allowed per step, at least 1 (or None for no limit), not {limit}")

    def limited(residual: Tensor, kept: Kept) -> Tensor:
        norm = torch.linalg.vector_norm(residual)  # ()
        before = kept.get("residual_norm")
        if before is None:
            kept["residual_norm"] = norm
            return residual
        bound = before * limit
        # After a zero there is nothing to compare with: a layer behind a zero-initialized one would be held at zero for ever.
        held = torch.where((before > 0) & (norm > bound), bound / norm, torch.ones_like(norm))
        kept["residual_norm"] = norm * held
        return residual * held

    return limited
