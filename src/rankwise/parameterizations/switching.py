"""A trained weight that becomes two trained factors when a procedure asks for it: what Cuttlefish trains.

    W' = weight (m, n)      until "factorize" with rank r, then      W' = B A,  B = U_r Σ_r^½ (m, r),  A = Σ_r^½ V_rᵀ (r, n)

U Σ Vᵀ is the SVD of the weight as it stands then, so the layer moves by the discarded tail of the spectrum and by nothing else,
and not at all at full rank. Trained numbers m·n before and r(m + n) after; the factors replace W, they are not added to it.

Not a method: see `procedures/cuttlefish.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register


def balanced(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n), the best product of rank r, with the singular values shared evenly."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = truncated_svd(wide, rank)
    root = S.sqrt()
    # Contiguous, as they come back from a file: else a resumed run would round differently.
    return (U * root).to(weight.dtype).contiguous(), (root[:, None] * Vh).to(weight.dtype).contiguous()


@register("parameterization")
class Switching(Parameterization):
    """W' = weight, later B A.

    Args:
        site: the layer.
    """

    facts = Facts(additive=False, exact_lora_export=False)
    weight: nn.Parameter | None
    B: nn.Parameter | None
    A: nn.Parameter | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = nn.Parameter(site.cast(site.weight()).contiguous())  # (m, n)
        self.register_parameter("B", None)
        self.register_parameter("A", None)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"weight"})

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"factorize"})

    @classmethod
    def prunable(cls, **arguments: Any) -> bool:
        return False

    def forward(self, base: Operator) -> Operator:
        if self.B is not None and self.A is not None:
            return LowRank(self.B, self.A)
        return Dense(self._whole())

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        self._hold(*balanced(self._whole(), int(arguments["rank"])))
        return {"B": None, "A": None}

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if "B" in shapes and self.weight is not None:
            self._hold(self.weight.new_zeros(shapes["B"]), self.weight.new_zeros(shapes["A"]))

    def _whole(self) -> nn.Parameter:
        if self.weight is None:
            raise TypeError("this layer holds factors already; this is a bug in rankwise")
        return self.weight

    def _hold(self, B: Tensor, A: Tensor) -> None:
        trained = self._whole().requires_grad
        self.weight, self.rank = None, A.shape[0]
        self.B, self.A = nn.Parameter(B.detach(), trained), nn.Parameter(A.detach(), trained)
