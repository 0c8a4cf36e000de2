"""NoRA (nested): a small trained LoRA between two frozen outer factors taken from the weight; 2rq numbers per layer.

    W' = W + s · B_out B A A_out     B_out (m, r), A_out (r, n) frozen; B (r, q), A (q, r) trained; q = `rank`, r = `outer_rank`

The outer pair is the best rank-r product for W = U Σ Vᵀ: B_out = U_r Σ^½, A_out = Σ^½ V_rᵀ ("both"), or Σ on A_out alone
("input"), or nowhere ("none"). The gradient of the inner pair is that of plain LoRA with B_outᵀ G A_outᵀ (r, r) in place of
G, so Σ preconditions it: direction (i, j) moves with √(σ_i σ_j). `outer="awsvd"` weighs input j by c_j, its root mean square
on probe data, and minimizes ‖(W - B_out A_out) diag(c)‖. A starts kaiming-uniform, B at 0; s = α/q. `compensate` starts B
away from zero too and carries minus that product. Exactly LoRA of rank q (not r): the outer factors are folded into the inner
pair once per forward, 2rq(m + n) FLOPs, then 2q(m + n) per token, where the chain would take 2r(m + n) + 4rq.

q = r with A frozen at the identity is LoRA-XS. Not an adapter that trains four factors: the outer ones are buffers.

*Differs*: scale, split and start of the paper could not be read (s = 1, "both" and LoRA's start here); a public
re-implementation takes the outer factors' second direction for its inner start, which has rank one, and is not followed.

Lin, Li, Li, Zou, Xue, Guo: NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models, 2024, arXiv:2408.10280.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.approximations.weighted_svd import weighted_truncation
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.statistics import Statistic
from rankwise.parameterizations.frame import Framed
from rankwise.parameterizations.scaling import scale_of

SPLITS, OUTER = ("both", "input", "none"), ("svd", "awsvd")


@register("parameterization")
class NestedCore(Framed, Additive):
    """W' = W + s · B_out B A A_out.

    Args:
        site: the layer.
        rank: q, of the trained inner pair.
        outer_rank: r, of the frozen outer pair; at least q.
        alpha: numerator of s = α/q; None means q.
        split: where the outer pair has Σ: "both", "input" or "none".
        outer: "svd" of W, or "awsvd" weighted by the layer's inputs (reads statistics).
        compensate: start with B ≠ 0 and subtract that start, frozen.

    Example:
        >>> handle = rankwise.adapt_(model, rankwise.compose("nested_nora(rank=8, outer_rank=64)"))
    """

    # Inputs of an embedding are token numbers, which have no root mean square for awsvd; the paper adapts linear layers.
    facts = Facts(
        layouts=frozenset({"linear", "conv"}),
        expected_failures={
            "half_precision_value": "rounding the weight can flip a singular vector, and the numbers drawn beside it stay"
        },
    )
    frame = {"outer_B": "mr", "outer_A": "rn"}
    outer_B: Tensor
    outer_A: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        outer_rank: int = 64,
        alpha: float | None = None,
        split: str = "both",
        outer: str = "svd",
        compensate: bool = False,
    ) -> None:
        super().__init__()
        if split not in SPLITS or outer not in OUTER:
            raise ArgumentError(f"split is one of {SPLITS} and outer one of {OUTER}, not {split!r} and {outer!r}")
        self.rank, self.outer_rank, self.scale = rank, outer_rank, scale_of("lora", alpha, rank)
        self.split, self.outer = split, outer
        self.hold(site, outer_rank)
        self.B = nn.Parameter(site.zeros(outer_rank, rank))  # (r, q)
        self.A = nn.Parameter(self._input_factor(site))  # (q, r)
        if compensate and not site.blank:
            with torch.no_grad():
                self.B.copy_(site.uniform(outer_rank, rank, bound=1 / math.sqrt(rank), purpose="output factor"))
                start = self.update()
                self.carry(LowRank(-start.B, start.A, start.scale).folded(), absorbed=False)

    def _input_factor(self, site: Site) -> Tensor:
        return site.uniform(self.rank, self.outer_rank, bound=1 / math.sqrt(self.outer_rank))  # (q, r)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A", "B"})

    @classmethod
    def needs_of(cls, **arguments: Any) -> frozenset[Statistic]:
        return frozenset({Statistic.INPUT_GRAM} if arguments.get("outer") == "awsvd" else ())

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # see problems_at

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        inner, outer = arguments.get("rank", 8), arguments.get("outer_rank", 64)
        largest = min(site.m, site.n)
        if 1 <= inner <= outer <= largest:
            return []
        return [
            Problem(
                piece=cls.__name__,
                needs=f"1 <= rank <= outer_rank <= min(m, n) = {largest}",
                has=f"rank is {inner} and outer_rank {outer} for a layer of {site.m} × {site.n}",
                remedy=f"use outer_rank={largest} or less and a rank below it, or leave the layer out with where=",
                sites=(site.name,),
            )
        ]

    def read(self, site: Site) -> Mapping[str, Tensor]:
        weight, r = site.weight(), self.outer_rank
        factors, values, _ = weighted_truncation(
            weight, self._input_sizes(site), r, split="balanced" if self.split == "both" else "right"
        )
        A, values = factors.A, values[:r, None]  # (r, n), (r, 1)
        if self.split == "none":
            noise = torch.finfo(values.dtype).eps * max(weight.shape) * values.max()
            A = A / torch.where(values > noise, values, 1.0)  # a direction without content keeps its zeros
        return {"outer_B": factors.B, "outer_A": A}

    def _input_sizes(self, site: Site) -> Tensor | None:
        """C (n,): root mean squares of the inputs."""
        if self.outer == "svd" or site.statistics is None:
            return None
        moments = site.statistics.require_inputs()
        return (moments.gram.diagonal() / max(moments.count, 1)).sqrt()

    def update(self) -> LowRank:
        return LowRank(self.outer_B @ self.B, self.A @ self.outer_A, self.scale)

    def restart(self, site: Site) -> None:
        self.B.zero_()
        self.A.copy_(self._input_factor(site))
