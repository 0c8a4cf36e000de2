"""LoRA with a gate on every rank, so that ranks can be closed one by one: the form under AdaLoRA and SoRA.

    W' = W + s · B diag(gate) A         B (m, r), gate (r,), A (r, n), all trained

form "svd" (AdaLoRA): A and B start at N(0, 0.02²), the gate at 0, s = α / (r + 1e-5); at first only the gate has a gradient.
form "sora": A kaiming-uniform, B at 0, gate ~ N(0, 1), s = α / r; at first only B has a gradient. Either way W' = W at the
start (on an embedding "sora" swaps the roles of A and B, since its columns are looked up one by one). A schedule
closes gates; s keeps the r it began with. Trained numbers r(m + n + 1); FLOPs 2r(m + n) per token, the gate is folded
into A. Exactly LoRA of rank r, and of the number of open gates. A start B₀ A₀ is held with the gate at 1; an input factor
replaces A and leaves the zero where the form has it.

Not a pruned LoRA by itself: that is what `adalora` and `sora` on the shelf of schedules do with it.

Zhang et al.: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv:2303.10512. Ding et al.: Sparse
Low-rank Adaptation of Pre-trained Language Models, 2023, arXiv:2311.11696.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import INPUT, OUTPUT, PAIR, PRODUCT, Additive, Site
from rankwise.core.piece import register


@register("parameterization")
class GatedLoRA(Additive):
    """W' = W + s · B diag(gate) A.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of s; None means r.
        form: how it starts and what divides alpha: "svd" (AdaLoRA) or "sora".
        dropout: probability of dropping an input of the update's branch.
    """

    def __init__(
        self, site: Site, *, rank: int = 8, alpha: float | None = None, form: str = "svd", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if form not in ("svd", "sora"):
            raise ArgumentError(f"form is svd (AdaLoRA) or sora, not {form!r}")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        value = float(rank if alpha is None else alpha)
        self.rank, self.form, self.dropout, self.thin = rank, form, dropout, site.thin
        self.scale = value / (rank + 1e-5) if form == "svd" else value / rank
        B, gate, A = self._draw(site)
        self.B, self.gate, self.A = nn.Parameter(B), nn.Parameter(gate), nn.Parameter(A)  # (m, r), (r,), (r, n)

    def _draw(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """B (m, r), gate (r,), A (r, n), with B diag(gate) A = 0."""
        r = self.rank
        if self.form == "svd":
            B, A = site.normal(site.m, r, std=0.02, purpose="B"), site.normal(r, site.n, std=0.02, purpose="A")
            return B, site.zeros(r), A
        gate = site.normal(r, purpose="gate")
        if site.layout.kind == "embedding":
            return site.normal(site.m, r, purpose="B"), gate, site.zeros(r, site.n)
        return site.zeros(site.m, r), gate, site.uniform(r, site.n, bound=1 / math.sqrt(site.n), purpose="A")

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B", "gate"})

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({PRODUCT, INPUT, OUTPUT, PAIR})

    @classmethod
    def gate_starts_open(cls, **arguments: Any) -> bool:
        return arguments.get("form", "svd") == "sora"

    @classmethod
    def narrows(cls, **arguments: Any) -> bool:
        return True

    def update(self) -> Operator:
        update = LowRank(self.B, self.gate[:, None] * self.A, self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def load_factors(self, factors: LowRank) -> None:
        self.A.copy_(factors.A)
        if bool(factors.B.any()):  # a product, an output factor or a pair
            self.B.copy_(factors.B)
            self.gate.fill_(1.0)
        elif self.form == "sora":  # an input factor: the zero stays in B, or in the gate
            self.B.zero_()

    def restart(self, site: Site) -> None:
        for place, value in zip((self.B, self.gate, self.A), self._draw(site), strict=True):
            place.copy_(value)
