"""Intruder dimensions: leading singular directions of the tuned matrix that resemble none of the base's.

With W = U₀ S₀ V₀ᵀ and W' = W + s B A = U₁ S₁ V₁ᵀ, the j-th left vector (j <= k) is an intruder where max_i |⟨u₁_j, u₀_i⟩| < ε,
i over all of the base's. They come with low rank and high learning rates, and with forgetting. Damping scales them,

    W(λ) = W' + (λ - 1) Σ_{j intruder} s₁_j u₁_j v₁_jᵀ,       an exact LoRA of rank r + #intruders:
    B' = [s B, (λ - 1) s₁_j u₁_j]  (m, r + #),   A' = [A; v₁_jᵀ]  (r + #, n)

λ = 1 changes nothing, λ = 0 removes them. Not bounded by the update's rank (near-equal base directions rotate freely), so the
count is shown beside that of Gaussian noise of the same Frobenius norm: noise makes "intruders" too where it dominates.

*Differs* from the release: right vectors on request (side="right"), a random control, exact export of the damped adapter.

Shuttleworth, Andreas, Torralba, Sharma: LoRA vs Full Fine-tuning: An Illusion of Equivalence, 2024, arXiv:2410.21228.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.certificates.intruder_vectors import choose_damping, intruders, scale_intruders, sweep
from rankwise.core.errors import ArgumentError, shorten
from rankwise.core.operators import Dense, Operator
from rankwise.core.protocols import Report
from rankwise.core.queries import svd
from rankwise.core.randomness import generator_for

__all__ = ["choose_damping", "intruders", "scale_intruders", "sweep", "theory_intruder_dimensions"]


def theory_intruder_dimensions(
    base: Mapping[str, Tensor],
    updates: Mapping[str, Operator],
    *,
    k: int = 10,
    eps: float = 0.5,
    side: str = "left",
    control: bool = True,
    seed: int = 0,
) -> Report:
    """Counts intruders layer by layer, beside those of noise of the same size.

    Args:
        base: site -> untouched weight (m, n).
        updates: site -> W' - W.
        k: leading vectors looked at.
        eps: ε, below which a cosine makes an intruder.
        side: "left" or "right" singular vectors.
        control: count a norm-matched Gaussian update as well.
        seed: of the control.
    """
    missing = [site for site in updates if site not in base]
    if missing or not updates:
        raise ArgumentError(
            f"no base weight for {shorten(missing) or 'anything, and no updates'}; pass site -> (m, n) for every site"
        )
    table: list[dict[str, Any]] = []
    for site, update in updates.items():
        W = base[site].to(torch.promote_types(base[site].dtype, torch.float32))
        first = svd(Dense(W))
        found = intruders(W, update, k=k, eps=eps, side=side, decomposed=first)
        row: dict[str, Any] = {
            "site": site,
            "intruders": int(found.flags.sum()),
            "positions": found.flags.nonzero().flatten().tolist(),
            "largest ratio": float((found.tuned.S[found.flags] / found.top).max()) if found.flags.any() else 0.0,
            "smallest cosine": float(found.cosines.min()),
        }
        if control:
            noise = torch.randn(W.shape, generator=generator_for(seed, site, "control"), dtype=torch.float64).to(W)
            size = update.dense().to(W).norm() / noise.norm()
            row["control"] = int(intruders(W, Dense(noise * size), k=k, eps=eps, side=side, decomposed=first).flags.sum())
        table.append(row)
    total = sum(row["intruders"] for row in table)
    measured = {"intruders": float(total), "per layer": total / len(table)}
    if control:
        measured["random control"] = float(sum(row["control"] for row in table))
    if total == 0:
        reading = "no new directions on top: the update works with those the base has."
    elif control and total <= measured["random control"]:
        reading = "noise of this size makes as many: it is the size of the update that is foreign; lower the rate or the scale."
    else:
        reading = "the update is spectrally foreign to the base: expect forgetting; raise r with α = 2r, or damp it."
    return Report(
        name="theory_intruder_dimensions",
        measured=measured,
        assumptions=(f"leading {k} {side} vectors, cosine below {eps}; an observation about forgetting, not a bound",),
        where=f"{len(table)} layers",
        reading=reading,
        table=tuple(table),
    )
