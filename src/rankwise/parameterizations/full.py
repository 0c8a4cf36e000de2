"""Full fine-tuning as a parameterization: a trained copy of the weight acts instead of the frozen one.

    W' = weight          weight (m, n) trained, starts at W

The frozen weight stays underneath, so the base can be restored and the update W' - W read off. Trained numbers m·n. It is what
gradient projection (GaLore and its kin) works on. Not of low rank; nothing to export as LoRA.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rankwise.core.operators import Dense, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register


@register("parameterization")
class Full(Parameterization):
    """W' = weight.

    Args:
        site: the layer.
    """

    facts = Facts(additive=False, exact_lora_export=False)

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = nn.Parameter(site.cast(site.weight()).contiguous())  # (m, n)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"weight"})

    def forward(self, base: Operator) -> Operator:
        return Dense(self.weight)
