"""RandLoRA: a sum of many frozen random bases of rank r, each trained through two diagonals, so that the update has full rank.

    W' = W + s · D, or Dᵀ where m < n        D = Σ_j B_j diag(Lambda[:, j]) A diag(Gamma[j])      D (max(m, n), min(m, n))

With mn = min(m, n) and mx = max(m, n) there are N = ⌈mn / r⌉ bases: B_j = B[:mx, j] (mx, r), A[:, :mn] (r, mn) are slices of
one pair shared by the model, frozen; Lambda (r, N) starts at zero, Gamma (N, mn) at 1 / max(N, mn), so W' = W. The *smaller*
r, the more is trained: r N + N mn numbers, about mn²/r. s = α / r. The pair is drawn by a private CPU generator, A first:
uniform ("dense"), or -1, 0, +1 with P(±1) = 1/3 together ("sparse") or 1/√mn_max ("very_sparse"), then divided by its standard
deviation; a checkpoint holds seed and hash. With many tokens a layer makes W + s D once, 2 mx mn N r FLOPs, for one product;
with few the factors act, 2 N r (m + n) per token (see `many_bases`). Full rank in general, so it exports as LoRA only
by truncation.

`pairing="peft"` flattens the two factors in different orders, as the release and PEFT do: column (j, k) of B meets row (k',
j') of A where jr + k = k'N + j'. Same count, another function; the two agree for N = 1 or r = 1. *Differs*: the paper's
formula is the default; bases are drawn in float64 (the release: in half precision, so that they depend on the machine).

Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad: RandLoRA: Full-rank parameter-efficient
fine-tuning of large models, 2025, arXiv:2502.00987.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.parameterizations.many_bases import Bases

PAIRINGS, PROJECTIONS = ("paper", "peft"), ("dense", "sparse", "very_sparse")


@register("parameterization")
class RandomBases(Additive):
    """W' = W + s · Σ_j B_j diag(Lambda[:, j]) A diag(Gamma[j]).

    Args:
        site: the layer.
        rank: r of each basis.
        alpha: numerator of s = alpha / r.
        pairing: "paper" or "peft".
        projection: "dense", "sparse" or "very_sparse".
        dropout: probability of dropping an input of the update's branch.
    """

    facts = Facts(exact_lora_export=False)
    bank: Bank

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 32,
        alpha: float = 640.0,
        pairing: str = "paper",
        projection: str = "dense",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pairing not in PAIRINGS:
            raise ArgumentError(f"pairing is paper or peft, not {pairing!r}")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        assert site.bank is not None
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already
        self.rank, self.scale, self.pairing, self.dropout, self.thin = rank, alpha / rank, pairing, dropout, site.thin
        self.m, self.n = site.m, site.n
        count, narrow = -(-min(site.m, site.n) // rank), min(site.m, site.n)
        self.Lambda = nn.Parameter(site.zeros(rank, count))  # (r, N)
        self.Gamma = nn.Parameter(site.zeros(count, narrow) + 1 / max(count, narrow))  # (N, mn)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"Lambda", "Gamma"})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # of a basis; one wider than the layer is cut

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        rank, projection = arguments.get("rank", 32), arguments.get("projection", "dense")
        if rank < 1:
            raise ArgumentError(f"rank is at least 1, not {rank}")
        if projection not in PROJECTIONS:
            raise ArgumentError(f"projection is one of {', '.join(PROJECTIONS)}, not {projection!r}")
        narrow, wide = max(min(site.m, site.n) for site in sites), max(max(site.m, site.n) for site in sites)
        share = {"dense": 0.0, "sparse": 1 / 3, "very_sparse": 1 / math.sqrt(narrow)}[projection]

        def draw(name: str, *size: int, generator: torch.Generator) -> Tensor:
            values = torch.rand(*size, generator=generator, dtype=torch.float64) * 2 - 1
            if share:
                values = values.sign() * (values.abs() < share)
            return sites[0].cast(values / values.std())

        return Bank.drawn({"A": (rank, narrow), "B": (wide, -(-narrow // rank), rank)}, draw, seed=sites[0].seed)

    def update(self) -> Operator:
        narrow, N = min(self.m, self.n), self.Lambda.shape[1]
        A, B = self.bank["A"][:, :narrow], self.bank["B"][: max(self.m, self.n), :N].flatten(1)  # (r, mn), (mx, N r)
        paper, tall = self.pairing == "paper", self.m >= self.n
        update = Bases(B, A, self.Lambda, self.Gamma, self.scale, paper=paper, tall=tall)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def restart(self, site: Site) -> None:
        self.Lambda.zero_()
        self.Gamma.fill_(1 / max(self.Gamma.shape))
