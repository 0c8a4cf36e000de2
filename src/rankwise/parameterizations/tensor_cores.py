"""LoTR: the updates of all layers of one shape as a tensor with two shared factors and a small core per layer.

    W'_k = W_k + s · left core_k right        left (m, r), right (r, n) shared by all layers of a shape; core_k (r, r)

All three are trained. left and right start at N(0, `factor_std`²), the cores at zero, so W' = W and only the cores have a
gradient at first. s = `scale` / r. Trained numbers per group of K layers r(m + n) + K r²; FLOPs 2r(m + n) + 2r² per token.
Exactly LoRA of rank r, B = left core_k, A = right. Layers of different shapes never share. Standard deviation 1 is the
release's; with it the update grows like s √(mn), so small rates suit it, or factor_std = 1/√n.

Not Tied-LoRA, whose layers differ by diagonals, nor LoRA-XS, whose factors are frozen and each layer's own.

*Differs* from the release: the factors are not started from the weights; merging is there.

Bershatsky, Cherniuk, Daulbaev, Mikhalev, Oseledets: LoTR: Low Tensor Rank Weight Adaptation, 2024, arXiv:2402.01376.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register


def group_of(site: Site) -> str:
    """The name of a layer's group: its shape."""
    return f"shape_{site.m}_{site.n}"


@register("parameterization")
class TensorCores(Additive):
    """W' = W + s · left core right, left and right shared by the layers of a shape.

    Args:
        site: the layer.
        rank: r.
        scale: numerator of s = scale / r.
        factor_std: standard deviation of left and right at the start.
    """

    bank: Bank

    def __init__(self, site: Site, *, rank: int = 8, scale: float = 1.0, factor_std: float = 1.0) -> None:
        super().__init__()
        assert site.bank is not None
        if not factor_std > 0:
            raise ArgumentError(f"factor_std is positive, not {factor_std}: with zero factors and cores nothing would train")
        self.rank, self.scale, self.group = rank, scale / rank, group_of(site)
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already
        self.core = nn.Parameter(site.zeros(rank, rank))  # (r, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"left", "right", "core"})

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        rank, std = arguments.get("rank", 8), arguments.get("factor_std", 1.0)
        groups: dict[str, dict[str, Tensor]] = {}
        for site in sites:
            name = group_of(site)
            if name not in groups:
                drawn = dataclasses.replace(site, name=name)  # the same numbers whichever layer of the group comes first
                left = nn.Parameter(drawn.normal(site.m, rank, std=std, purpose="left"))  # (m, r)
                right = nn.Parameter(drawn.normal(rank, site.n, std=std, purpose="right"))  # (r, n)
                groups[name] = {"left": left, "right": right}
        return Bank.grouped(groups)

    def update(self) -> Operator:
        shared = self.bank.group(self.group)
        return Chain(shared["left"], self.core, shared["right"], scale=self.scale)
