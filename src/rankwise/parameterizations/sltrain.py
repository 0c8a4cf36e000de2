"""SLTrain: a weight trained from scratch as a low-rank part plus a few entries at random places, with no dense weight to train.

    W' = s · B A + S          B (m, r), A (r, n), S the values (K,) at indices (2, K); K = ⌊density · m n⌋, s = alpha / r

The places are drawn once, uniformly and without repetition, and kept in the file; the layer's own W has no part in W', so the
model is another one from the first forward on, as if freshly initialized: B starts at 0, A and the values at U(±1/√n). The rank
of W' is min(m, n) for all practical densities, while B A alone has rank r: what the sparse part adds is the tail of the
spectrum. `keep_base` keeps W instead, W' = W + s · B A + S with the values at 0, to fine-tune a weight that is there already.
Trained numbers r(m + n) + K. A linear layer makes W' in forward and again in backward, 2mnr FLOPs each, and keeps x, the
factors and the values (see `low_rank_plus_sparse.py`). Not of low rank; nothing to export as LoRA.

Not a fit to W: without `keep_base` what the layer had learned is gone. Weight decay on the values would shrink the tail of the
spectrum; AdamW here leaves vectors alone.

*Differs* from the release: biases stay as they are (they are the model's, not the weight's), the frozen weight stays in memory
so that `detach_` gives it back, and each layer draws its own places from the seed and its name.

Han, Li, Huang, Hong, Takeda, Jawanpuria, Mishra: SLTrain: a sparse plus low-rank approach for parameter and memory efficient
pretraining, 2024, arXiv:2406.02214.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import INPUT, Additive, Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.parameterizations.low_rank_plus_sparse import LowRankPlusSparse, random_places

ROLES = frozenset({"A", "B", "values"})


@register("parameterization")
class SLTrain(Parameterization):
    """W' = s · B A + S, in place of W.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s.
        density: share of the matrix's entries that S holds; 0 leaves B A alone.
    """

    facts = Facts(
        additive=False,
        starts_at_base=False,
        exact_lora_export=False,
        expected_failures={"starts_at_base": "the weight is replaced by a fresh one, to be trained from scratch"},
    )
    A: Tensor
    B: Tensor
    indices: Tensor

    def __init__(self, site: Site, *, rank: int = 128, alpha: float = 32.0, density: float = 0.03) -> None:
        super().__init__()
        self.rank, self.scale = rank, alpha / rank
        _equip(self, site, density)
        self.values = nn.Parameter(site.uniform(self.indices.shape[1], bound=1 / math.sqrt(site.n), purpose="values"))  # (K,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return ROLES

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        return _density_problems(site, arguments.get("density", 0.03))

    def forward(self, base: Operator) -> Operator:
        return LowRankPlusSparse(self.B, self.A, self.values, self.indices, self.scale)


@register("parameterization")
class SparsePlusLowRank(Additive):
    """W' = W + s · B A + S.

    Args:
        site: the layer.
        rank: r.
        alpha: numerator of the scale s.
        density: share of the matrix's entries that S holds; 0 leaves B A alone.
    """

    facts = Facts(exact_lora_export=False)
    A: Tensor
    B: Tensor
    indices: Tensor

    def __init__(self, site: Site, *, rank: int = 128, alpha: float = 32.0, density: float = 0.03) -> None:
        super().__init__()
        self.rank, self.scale = rank, alpha / rank
        _equip(self, site, density)
        self.values = nn.Parameter(site.zeros(self.indices.shape[1]))  # (K,)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return ROLES

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({INPUT})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        return _density_problems(site, arguments.get("density", 0.03))

    def update(self) -> Operator:
        return LowRankPlusSparse(self.B, self.A, self.values, self.indices, self.scale)

    def load_factors(self, factors: LowRank) -> None:
        self.A.copy_(factors.A)


def _equip(entry: Parameterization, site: Site, density: float) -> None:
    """Gives it B (m, r) at zero, A (r, n) at U(±1/√n), and the indices (2, K)."""
    entry.B = nn.Parameter(site.zeros(site.m, entry.rank))
    entry.A = nn.Parameter(site.uniform(entry.rank, site.n, bound=1 / math.sqrt(site.n), purpose="A"))
    count = math.floor(density * site.m * site.n)
    blank = torch.zeros(2, count, dtype=torch.int32)  # a file will fill it
    indices = blank if site.blank else random_places(site.m, site.n, count, site.generator("places"))
    entry.register_buffer("indices", indices.to(site.device))


def _density_problems(site: Site, density: float) -> list[Problem]:
    if not 0 <= density <= 1:
        raise ArgumentError(f"density is a share of the entries, in [0, 1], not {density}")
    if density == 0 or math.floor(density * site.m * site.n):
        return []
    return [
        Problem(
            piece="sltrain",
            needs=f"at least one of the layer's {site.m * site.n} entries, a density of {1 / (site.m * site.n):g}",
            has=f"density is {density:g}",
            remedy="use a larger density, 0 for no sparse part, or leave the layer out with where=",
            sites=(site.name,),
        )
    ]
