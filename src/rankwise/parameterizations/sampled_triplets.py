"""A weight kept as its singular triplets, of which all values and some of the vectors are trained; see `procedures/sst.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.truncated_svd import truncated_svd
from rankwise.core.combinators import Sum
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.parameterizations.factored import TURNED, bare, triplets


def probabilities(S: Tensor) -> Tensor:
    """The chance p (k,) of each index: half uniform, half by singular value (k,), in float64."""
    values, k = S.detach().double(), S.shape[0]
    total = values.sum()
    return 0.5 / k + 0.5 * torch.where(total > 0, values / total, torch.full_like(values, 1 / k))


def sampled(S: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """(r,) different indices of singular values (k,), ascending."""
    drawn = torch.multinomial(probabilities(S).cpu(), rank, replacement=False, generator=generator)
    return drawn.sort().values.to(S.device)


@register("parameterization")
class Triplets(Parameterization):
    """W' = U diag(S) Vᵀ with some of the vectors trained.

    Args:
        site: the layer.
        rank: r, how many.
    """

    facts = Facts(additive=False, exact_lora_export=False, expected_failures=TURNED)
    U: Tensor
    V: Tensor
    active: Tensor

    def __init__(self, site: Site, *, rank: int = 64) -> None:
        super().__init__()
        self.rank = rank
        U, S, V = triplets(site, min(site.m, site.n))
        self.S = nn.Parameter(S)  # (k,)
        self.register_buffer("U", U)  # (m, k), of which the active columns follow U_active after every step
        self.register_buffer("V", V)  # (n, k)
        blank = torch.arange(rank, device=site.device)
        self.register_buffer("active", blank if site.blank else sampled(S, rank, site.generator("active")))  # (r,)
        self.U_active, self.V_active = (nn.Parameter(tensor[:, self.active]) for tensor in (U, V))  # (m, r), (n, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"S", "U_active", "V_active"})

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"normalize", "sample", "resvd"})

    def forward(self, base: Operator) -> Operator:
        rest = Chain(self.U, self.S.index_fill(0, self.active, 0.0), self.V.mT)
        S = self.S.index_select(0, self.active)  # (r,)
        if torch.is_grad_enabled():
            return Sum(rest, bare(self.U_active, S, self.V_active))
        return Sum(rest, Chain(self.U_active, S, self.V_active.mT))

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        self.S.clamp_(min=0.0)
        for vectors, trained in ((self.U, self.U_active), (self.V, self.V_active)):
            trained.div_(trained.norm(dim=0).clamp_min(torch.finfo(trained.dtype).tiny))
            vectors[:, self.active] = trained
        if what == "normalize":
            return {}
        if what == "resvd":
            found = truncated_svd((self.U * self.S) @ self.V.mT, self.S.shape[0])
            for tensor, value in ((self.U, found.U), (self.S, found.S), (self.V, found.Vh.mT)):
                tensor.copy_(value)
        self.active.copy_(sampled(self.S, self.rank, generator))
        self.U_active.copy_(self.U[:, self.active])
        self.V_active.copy_(self.V[:, self.active])
        return dict.fromkeys(("U_active", "V_active") if what == "sample" else ("S", "U_active", "V_active"))
