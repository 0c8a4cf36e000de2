"""EDoRA: DoRA whose direction is moved by a small core between singular vectors; r² + m numbers per layer.

    W' = diag(μ / ‖V‖_row) V,   V = W + s · U_r R Σ_r V_rᵀ          R (r, r) and μ (m,) trained, U_r and Σ_r V_rᵀ frozen

Nothing is new but the pair: LoRA-XS inside DoRA (see `small_core.py` and `magnitude.py`, whose code this is). R starts at
N(0, `core_std`²) and μ at ‖W‖_row, the lengths before R is drawn, so that the first forward is the base to about that size;
with `core_std=0` it is the base, as in `dora(inner=lora_xs)`. s = α/r. Scaling V as a whole changes nothing, so lengths
belong to μ alone. At small r the m magnitudes are most of what is trained. Full rank; merges exactly.

*Differs* from the release, whose merging helper leaves the magnitude out.

Nasiri, Garraghan: EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition, 2025,
arXiv:2501.12067.
"""

from __future__ import annotations

from typing import Any

import torch

from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import PRODUCT, Facts, Parameterization, Site
from rankwise.core.piece import piece, register
from rankwise.parameterizations.magnitude import Magnitude
from rankwise.parameterizations.small_core import SmallCore


@register("parameterization")
class CoreMagnitude(Parameterization):
    """W' = diag(μ / ‖V‖_row) V with V = W + s · U_r R Σ_r V_rᵀ.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of s = α/r; None means r.
        core_std: standard deviation of R at the start.
        dropout: probability of dropping an input wherever the result differs from W x.
        detach_norm: treat the norms as constants in backward, as published.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("edora(rank=16)"))
    """

    facts = Facts(additive=False, exact_lora_export=False, starts_at_base=False)

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 16,
        alpha: float | None = 16.0,
        core_std: float = 1e-5,
        dropout: float = 0.0,
        detach_norm: bool = True,
    ) -> None:
        super().__init__()
        inner = piece(SmallCore, rank=rank, alpha=alpha)
        self.decomposed = Magnitude(site, inner=inner, dropout=dropout, detach_norm=detach_norm)
        self.rank, self.scale = self.decomposed.rank, self.decomposed.scale
        with torch.no_grad():
            self.roles()["R"].copy_(site.normal(rank, rank, std=core_std, purpose="core"))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"R", "magnitude"})

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({PRODUCT})

    def forward(self, base: Operator) -> Operator:
        return self.decomposed(base)

    def update(self) -> Operator:
        return self.decomposed.update()

    def load_factors(self, factors: LowRank) -> None:
        self.decomposed.load_factors(factors)

    def refresh(self, base: Operator) -> None:
        self.decomposed.refresh(base)
