"""AFLoRA's form: two projections of the layer's own, with a trained vector after each of them.

    W' = W + diag(v) B diag(u) A         B (m, r), A (r, n), v (m,), u (r,)

v starts at 0, so that W' = W, u at 0.1, B and A kaiming-uniform with gain √2, U(±√(6 / fan_in)); there is no α / r. The vectors
are always trained, the projections until a schedule (`schedules/aflora.py`) freezes them; in a square layer, as attention has
them, they are frozen from the start unless `train_square` says otherwise. Trained numbers r(m + n) + r + m, or r + m where they
are frozen; FLOPs 2r(m + n) per token. v is folded into B, so that no (T, m) tensor is kept for it; with A frozen, the (T, n)
input is not kept either. Exactly LoRA of rank r. A start B₀ A₀ is held with both vectors at 1.

Not VeRA, whose projections are shared by all layers and never trained.

Liu, Kundu, Li, Wan, Jiang, Beerel: AFLoRA: Adaptive Freezing of Low Rank Adaptation in Parameter Efficient Fine-Tuning of Large
Models, 2024, arXiv:2403.13269.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from rankwise.core.operators import Chain, LowRank, Operator
from rankwise.core.parameterization import INPUT, PRODUCT, Additive, Site
from rankwise.core.piece import register

U_START = 0.1


@register("parameterization")
class ProjectedVectors(Additive):
    """W' = W + diag(v) B diag(u) A.

    Args:
        site: the layer.
        rank: r.
        train_square: train A and B of square layers too.
    """

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, *, rank: int = 4, train_square: bool = False) -> None:
        super().__init__()
        self.rank = rank
        for role, projection in zip("BA", _draw(site, rank), strict=True):  # (m, r), (r, n)
            if site.m != site.n or train_square:
                self.register_parameter(role, nn.Parameter(projection))
            else:
                self.register_buffer(role, projection)
        self.u = nn.Parameter(site.zeros(rank) + U_START)  # (r,)
        self.v = nn.Parameter(site.zeros(site.m))  # (m,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B", "u", "v"})

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({PRODUCT, INPUT})

    def update(self) -> Operator:
        return Chain(self.v[:, None] * self.B, self.u, self.A)

    def load_factors(self, factors: LowRank) -> None:
        self.A.copy_(factors.A)
        if bool(factors.B.any()):  # a product
            self.B.copy_(factors.B)
            self.u.fill_(1.0)
            self.v.fill_(1.0)

    def restart(self, site: Site) -> None:
        for place, projection in zip((self.B, self.A), _draw(site, self.rank), strict=True):
            place.copy_(projection)
        self.u.fill_(U_START)
        self.v.zero_()


def _draw(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n), kaiming-uniform."""
    B = site.uniform(site.m, rank, bound=math.sqrt(6 / rank), purpose="B")
    return B, site.uniform(rank, site.n, bound=math.sqrt(6 / site.n), purpose="A")
