"""FourierFT: the update is a sum of a few plane waves at fixed random frequencies, whose amplitudes are trained.

    update[o, i] = a / (mn) · Σ_k c_k cos(2π (p_k o / m + q_k i / n))          c (n_f,) trained, (p_k, q_k) fixed

This is a times the real part of the inverse transform of a spectrum with c_k at (p_k, q_k), without symmetrization. The
positions are the first n_f of a random permutation of all mn, from a CPU generator with `location_seed`, so they are the same
in layers of equal shape; they are kept in the file. c starts at zero, so W' = W. There is no rank: a = `scale` stands before
1/(mn). Since cos(u + v) = cos u cos v - sin u sin v, the update is exactly LoRA of rank 2 n_f with fixed waves. Trained numbers
n_f.

Applied, whichever is cheaper, as that LoRA, 4 n_f(m + n) FLOPs per token, or by transforming x, combining n_f pairs of
frequencies, and transforming back (see `waves`); the matrix is not made.

*Differs*: starts at zero, where the release draws c from N(0, 1) and so does not start at the base.

Gao et al.: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, ICML 2024, arXiv:2405.03003.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import Problem
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.plan import Plan, can_plan
from rankwise.parameterizations.waves import Waves, halves


@register("parameterization")
class FourierFT(Additive):
    """W' = W + n_f plane waves with trained amplitudes.

    Args:
        site: the layer.
        frequencies: n_f.
        scale: a.
        location_seed: of the positions.
    """

    positions: Tensor

    def __init__(self, site: Site, *, frequencies: int = 1000, scale: float = 150.0, location_seed: int = 777) -> None:
        super().__init__()
        self.scale, self.size, self.plan, self.once = float(scale), (site.m, site.n), Plan(), site.once
        positions = torch.zeros(2, frequencies, dtype=torch.int64)
        if not site.blank:
            positions = positions_of(site.m, site.n, frequencies, location_seed)
        self.register_buffer("positions", positions.to(site.device))
        self.coefficients = nn.Parameter(site.zeros(frequencies))  # (n_f,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"coefficients"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        frequencies, most = arguments.get("frequencies", 1000), site.m * site.n
        if 1 <= frequencies <= most:
            return []
        return [
            Problem(
                piece="fourierft",
                needs=f"1 <= frequencies <= mn = {most}",
                has=f"frequencies is {frequencies} for a layer of {site.m} × {site.n}",
                remedy=f"use frequencies={most} or less",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        return Waves(self.coefficients, self.positions, self.size, self.scale, self._known(), self.once)

    def _known(self) -> Tensor | None:
        """What `waves` needs to know of the positions, kept until they change."""
        if torch.compiler.is_compiling() or not can_plan([self.positions]):
            return None
        known = self.plan.find([self.positions])
        if known is None:
            known = halves(self.positions, self.size)
            self.plan.keep([self.positions], known)
        return known

    def restart(self, site: Site) -> None:
        self.coefficients.zero_()


def positions_of(m: int, n: int, frequencies: int, seed: int) -> Tensor:
    """The frequencies (2, n_f) of a seed, in a matrix (m, n)."""
    flat = torch.randperm(m * n, generator=torch.Generator().manual_seed(seed))[:frequencies]
    return torch.stack([flat // n, flat % n])
