"""A weight as a product B A of full inner rank whose directions are ordered: what Maestro trains.

    W' = B A          B (m, R) = U Σ^½, A (R, n) = Σ^½ Vᵀ at the start, R = min(m, n), so that W' = W there

In training only the first `prefix` columns of B and rows of A act where that is set: the nested sub-models of one layer, of
which every narrower one is a part of the wider. Outside training the layer is whole. Trained numbers R(m + n), up to twice
those of W before anything is cut away; the factors replace W, they are not added to it.

Not a method: see `procedures/maestro.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Facts, Parameterization, Site
from rankwise.core.piece import register
from rankwise.parameterizations.switching import balanced


@register("parameterization")
class NestedFactors(Parameterization):
    """W' = B A, or B[:, :b] A[:b] for a prefix b.

    Args:
        site: the layer.
    """

    facts = Facts(
        additive=False,
        exact_lora_export=False,
        expected_failures={
            "half_precision_value": "the singular vectors of a rounded weight are turned against those of the exact one"
        },
    )
    cut: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.rank = min(site.m, site.n)
        B, A = (site.zeros(site.m, self.rank), site.zeros(self.rank, site.n)) if site.blank else _factors(site, self.rank)
        self.B, self.A = nn.Parameter(B), nn.Parameter(A)  # (m, R), (R, n)
        # One more than the prefix, or none where all act: the shape of a buffer, so that files keep it and no device is asked.
        self.register_buffer("cut", torch.zeros(0, dtype=torch.uint8))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B"})

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"cut"})

    @classmethod
    def prunable(cls, **arguments: Any) -> bool:
        return False  # zeros would lead to a layer of zeros

    @property
    def prefix(self) -> int | None:
        """How many directions act in training; None for all."""
        return self.cut.shape[0] - 1 if self.cut.shape[0] else None

    @prefix.setter
    def prefix(self, value: int | None) -> None:
        if value is not None and value < 0:
            raise ArgumentError(f"a prefix is a number of directions, at least 0, or None for all; not {value}")
        self.cut = self.cut.new_zeros(0 if value is None else value + 1)

    def forward(self, base: Operator) -> Operator:
        prefix = self.prefix if self.training else None
        B, A = (self.B, self.A) if prefix is None else (self.B[:, :prefix], self.A[:prefix])
        if A.shape[0] == 0:  # a convolution into no channels cannot be run
            return Dense(B @ A)
        return LowRank(B, A)

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        self.prefix = arguments["prefix"]
        return {}

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.cut = self.cut.new_zeros(shapes["cut"])


def _factors(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    B, A = balanced(site.weight(), rank)
    return site.cast(B), site.cast(A)
