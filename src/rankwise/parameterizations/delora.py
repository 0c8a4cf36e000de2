"""DeLoRA: every rank-one term of the update has unit length, and one trained number says how strong they are together.

    W' = W + (B Ξ A - B₀ Ξ₀ A₀) diag(w),   Ξ = diag_i( λ / (r max(‖A_i‖, 1e-4) max(‖B_i‖, 1e-4)) )

A (r, n), B (m, r) and the strength λ (1,) are trained; w (n,) holds the column norms of W, frozen and saved with the
adapter. ‖B Ξ A‖_F <= |λ| whatever the factors grow to, so that long training and large learning rates do no harm. A starts
random, B with random columns of length one, and A₀, B₀ are their frozen copies, under the same λ: W' = W, every gradient of
the size of LoRA's. The update is bounded by 2|λ|; doubling λ doubles it. Trained numbers r(m + n) + 1; extra FLOPs 4r(m + n)
per token. Exactly LoRA of rank 2r. Weight decay on A and B changes nothing but step sizes.

`start="zero"` is the library's: B = 0 and no copies, rank r, half the FLOPs and the bound |λ|. There the first gradient of B
is λ/(r·1e-4) times LoRA's, so that clipping by the global norm stops all other layers; use it to go on with such files. With
`weight_norms=False` w is 1.

*Differs*: with several adapters on a layer w always comes from the untouched weight. The first release bound A₀ and B₀ to the
trained tensors' own storage; here they are copies.

Bini, Girrbach, Akata: Decoupling Angles and Strength in Low-rank Adaptation, 2025, arXiv:2503.18225.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.core.queries import column_norms, wide

SMALLEST = 1e-4  # a factor shorter than this is not brought to unit length


@register("parameterization")
class DeLoRA(Additive):
    """W' = W + (B Ξ A - B₀ Ξ₀ A₀) diag(w).

    Args:
        site: the layer.
        rank: r.
        strength: where λ starts.
        weight_norms: scale the columns by those of W.
        start: "paper", random factors and their frozen copies, or "zero", B = 0.
        dropout: probability of dropping an input of the update's branch.
    """

    column_norms: Tensor
    start_A: Tensor
    start_B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        strength: float = 15.0,
        weight_norms: bool = True,
        start: str = "paper",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if start not in ("paper", "zero"):
            raise ArgumentError(f"start is paper or zero, not {start!r}")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.dropout, self.thin, self.paper, self.weight_norms = (
            rank,
            dropout,
            site.thin,
            start == "paper",
            weight_norms,
        )
        A = site.uniform(rank, site.n, bound=1.0 / math.sqrt(site.n), purpose="A")  # (r, n)
        B = site.normal(site.m, rank, purpose="B")  # (m, r)
        B = B / B.norm(dim=0) if self.paper else torch.zeros_like(B)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.strength = nn.Parameter(site.zeros(1) + strength)  # (1,)
        read = weight_norms and not site.blank
        self.register_buffer("column_norms", site.cast(site.weight().norm(dim=0)) if read else site.zeros(site.n) + 1)  # (n,)
        if self.paper:
            self.register_buffer("start_A", A.clone())
            self.register_buffer("start_B", B.clone())

    @classmethod
    def prunable(cls, **arguments: Any) -> bool:
        return arguments.get("start", "paper") == "zero"

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B", "strength"})

    def update(self) -> Operator:
        B, A = self._even(self.B, self.A), self.A
        if self.paper:
            B = torch.cat([B, -self._even(self.start_B, self.start_A)], dim=1)  # (m, 2r)
            A = torch.cat([A, self.start_A])  # (2r, n)
        update = LowRank(B, A * self.column_norms)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def _even(self, B: Tensor, A: Tensor) -> Tensor:
        """B Ξ (m, r)."""
        lengths = wide(A).norm(dim=1).clamp_min(SMALLEST) * wide(B).norm(dim=0).clamp_min(SMALLEST)  # (r,)
        return B * (self.strength / (self.rank * lengths)).to(B.dtype)

    def refresh(self, base: Operator) -> None:
        if self.weight_norms:
            self.column_norms.copy_(column_norms(base))
