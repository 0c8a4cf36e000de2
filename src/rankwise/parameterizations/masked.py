"""CapaBoost: one pair of factors seen through several fixed random masks, whose products are added.

    W' = W + s Σ_i (B ∘ M_i)(A ∘ N_i)          i = 1 … d branches; B (m, r), A (r, n) trained and shared, s = α / r

M (d, m, r) and N (d, r, n) are drawn once, with a share ρ of ones, and kept with the adapter. B starts at 0, so W' = W under
any mask; A as in LoRA. The rank is d r for the trained numbers r(m + n) of LoRA; FLOPs are d times LoRA's, ρ d times where
zeros are skipped. "uniform" masks have exactly ⌊ρ · size⌋ ones anywhere; "nm" masks keep 2 of every 4 consecutive entries (ρ
= 1/2, the pattern of sparse tensor cores). Exactly LoRA of rank d r. An entry that no mask shows gets no gradient, only
weight decay.

*Differs*: in the release the second branch of B starts at random; A's bound is LoRA's 1/√n, not 1/√r; dropout thins the
input once for all branches, not once per branch.

Song, Tang, Lin, et al.: Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning, 2024,
arXiv:2407.01320.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.parameterizations.cayley import misfit
from rankwise.parameterizations.scaling import scale_of


@register("parameterization")
class Masked(Additive):
    """W' = W + s Σ_i (B ∘ M_i)(A ∘ N_i).

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of s.
        branches: d.
        density: ρ, the share of ones in a mask.
        masks: "uniform" or "nm".
        dropout: probability of dropping an input of the update's branch.
    """

    mask_A: Tensor
    mask_B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        branches: int = 2,
        density: float = 0.5,
        masks: str = "uniform",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if masks not in ("uniform", "nm") or branches < 1:
            raise ArgumentError(f"masks is uniform or nm and branches >= 1, not {masks!r} and {branches}")
        if not 0.0 < density <= 1.0 or (masks == "nm" and density != 0.5):
            raise ArgumentError(f"density is a share in (0, 1], and 1/2 with masks='nm'; it is {density}")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.scale, self.dropout, self.thin = rank, scale_of("lora", alpha, rank), dropout, site.thin
        self.A, self.B = nn.Parameter(site.zeros(rank, site.n)), nn.Parameter(site.zeros(site.m, rank))
        with torch.no_grad():
            self.restart(site)
        draw = draw_two_of_four if masks == "nm" else draw_uniform
        generator = site.generator("masks")
        for name, size in (("mask_A", (rank, site.n)), ("mask_B", (site.m, rank))):
            drawn = torch.stack([draw(size, density, generator) for _ in range(branches)])  # (d, r, n), (d, m, r)
            self.register_buffer(name, drawn.to(site.device))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        rank = arguments.get("rank", 8)
        if arguments.get("masks", "uniform") != "nm" or (site.m * rank % 4 == 0 and site.n * rank % 4 == 0):
            return []
        has = f"rank {rank} for a layer of {site.m} × {site.n}"
        return misfit("capaboost", site, "factors of a multiple of 4 entries", has, "use a rank that is a multiple of 4")

    def update(self) -> Operator:
        B = (self.B * self.mask_B).transpose(0, 1).flatten(1)  # (m, d r): [B ∘ M_1, …, B ∘ M_d]
        A = (self.A * self.mask_A).flatten(0, 1)  # (d r, n)
        update = LowRank(B, A, self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def restart(self, site: Site) -> None:
        self.A.copy_(site.uniform(self.rank, site.n, bound=1.0 / math.sqrt(site.n)))
        self.B.zero_()


def draw_uniform(size: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """A mask with exactly ⌊density · numel⌋ ones."""
    count = size[0] * size[1]
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: math.floor(density * count)]] = True
    return mask.view(size)


def draw_two_of_four(size: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """A mask with two ones in every four consecutive entries, row by row."""
    scores = torch.rand(size[0] * size[1] // 4, 4, generator=generator)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(2, dim=1).indices, True).view(size)
