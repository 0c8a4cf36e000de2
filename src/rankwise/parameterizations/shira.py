"""SHiRA: a fixed sparse set of weight entries is trained, one or two in a hundred.

    W' = W + scatter(values at indices)          values (K,) trained; indices (2, K) rows and columns; K = r(m + n)

The values start at zero, so W' = W. The rank r only sets the budget K, that of LoRA; the update's own rank is high. Where the
entries lie (`mask`): "random"; "structured", wrapped diagonals, which reach every row and column, and then whole rows until
K is used up; "magnitude", the largest |W|; "gradient", the largest |G|, G the gradient of the loss at this layer over
calibration data; "snip", the largest |W ∘ G|. The random ones depend on the seed and the layer's name, so layers of equal
shape differ. Indices, sorted row by row, are kept in the file. Merging changes K entries. There is no exact LoRA. Trained
numbers K.

A frozen linear layer copies W, adds K numbers, and multiplies once; backward makes the copy again, and dL/dvalues, which is
g xᵀ at the indices, takes K dot products, or the whole product where that is faster (see `core.sparse_linear`).

*Differs* from PEFT, whose default mask is the same for all layers of a shape and in all runs; "structured" has rows alone,
where the paper leaves rows or columns open.

Bhardwaj et al.: Sparse High Rank Adapters, NeurIPS 2024, arXiv:2406.13175.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.statistics import Statistic
from rankwise.core.structured import Sparse

MASKS = ("random", "structured", "magnitude", "gradient", "snip")


@register("parameterization")
class SHiRA(Additive):
    """W' = W + values at indices.

    Args:
        site: the layer.
        rank: r, which sets K = r(m + n) entries.
        mask: where they lie: random, structured, magnitude, gradient or snip.
    """

    facts = Facts(
        exact_lora_export=False,
        expected_failures={
            "half_precision_value": "rounded weights, or other data, choose other entries under the masks that read them"
        },
    )
    indices: Tensor

    def __init__(self, site: Site, *, rank: int = 32, mask: str = "random") -> None:
        super().__init__()
        self.rank, self.size = rank, (site.m, site.n)
        count = rank * (site.m + site.n)
        flat = torch.zeros(count, dtype=torch.int64) if site.blank else self._positions(site, mask, count).sort().values.cpu()
        indices = torch.stack([flat // site.n, flat % site.n]).to(torch.int32)  # (2, K)
        self.register_buffer("indices", indices.to(site.device))
        self.values = nn.Parameter(site.zeros(count))  # (K,)

    @staticmethod
    def _positions(site: Site, mask: str, count: int) -> Tensor:
        """K different positions of the matrix read row by row."""
        m, n = site.m, site.n
        if mask == "random":
            return torch.randperm(m * n, generator=site.generator("mask"))[:count]
        if mask == "structured":
            steps = torch.arange(max(m, n))
            diagonal = (steps % m) * n + steps % n  # (max(m, n),): one entry or more in every row and column
            rows = torch.randperm(m, generator=site.generator("mask"))  # the order in which rows are taken
            whole = (rows[:, None] * n + torch.arange(n)).flatten()
            return torch.cat([diagonal, whole[~torch.isin(whole, diagonal)]])[:count]
        score = site.weight().abs() if mask in ("magnitude", "snip") else 1.0
        if mask in ("gradient", "snip"):
            assert site.statistics is not None  # `needs_of` asks for it
            score = site.statistics.require_gradient().abs() * score
        assert isinstance(score, Tensor)
        return score.flatten().topk(count).indices

    @classmethod
    def needs_of(cls, **arguments: Any) -> frozenset[Statistic]:
        mask = arguments.get("mask", "random")
        if mask not in MASKS:
            raise ArgumentError(f"mask is one of {', '.join(MASKS)}, not {mask!r}")
        return frozenset({Statistic.GRADIENT} if mask in ("gradient", "snip") else ())

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"values"})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # the rank is a budget, see problems_at

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        rank, most = arguments.get("rank", 32), site.m * site.n // (site.m + site.n)
        if 1 <= rank <= most:
            return []
        return [
            Problem(
                piece="shira",
                needs=f"1 <= rank <= mn / (m + n), here {most}, since rank · (m + n) entries are trained",
                has=f"rank is {rank} for a layer of {site.m} × {site.n}",
                remedy=f"use rank={most} or less" if most else "leave the layer out with where=",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        rows, columns = self.indices.long()
        return Sparse(self.values, rows, columns, self.size)

    def restart(self, site: Site) -> None:
        self.values.zero_()
