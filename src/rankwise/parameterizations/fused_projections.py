"""LoRA on a fused projection: one weight that holds q, k and v, of which only some get an update.

    W' = W + s · (B_1 A_1; 0; B_3 A_3; …)          G equal row blocks of W, E of them enabled

A (r·E, n) and B (m/G·E, r) are trained and hold the enabled blocks one after the other: block g of the rows gets B_g A_g,
with B_g (m/G, r) and A_g (r, n); the rows of the others stay those of W. B starts at 0 and A as in LoRA. It is LoRA on each
projection by itself, which the rank of one LoRA on the whole weight would mix. Trained numbers r·E·(n + m/G); FLOPs 2r·E·(n +
m/G) per token; exactly LoRA of rank r·E. The roles are fused_A and fused_B, since they are no matrix pair: a step that needs
A and B would precondition one block with another's factor.

Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv:2106.09685 (the fused layer of its release).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, Operator, compute_dtype
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.queries import narrow_form
from rankwise.parameterizations.scaling import scale_of


class RowBlocks(Operator):
    """scale · (B_g A_g on the enabled row blocks, 0 on the others); B (E, m/G, r), A (E, r, n)."""

    def __init__(self, B: Tensor, A: Tensor, enabled: tuple[bool, ...], scale: float) -> None:
        self.B, self.A, self.enabled, self.scale = B, A, enabled, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[1] * len(self.enabled), self.A.shape[2]

    def narrow(self) -> LowRank:
        """The exact pair: B' (m, r·E) with the B_g in their rows, A' (r·E, n)."""
        count, rows, rank = self.B.shape
        places = [place for place, on in enumerate(self.enabled) if on]
        wide = self.B.new_zeros(len(self.enabled), rows, count, rank)
        index = torch.tensor(places, device=self.B.device), torch.arange(count, device=self.B.device)
        wide = wide.index_put((index[0].unsqueeze(1), torch.arange(rows, device=self.B.device), index[1].unsqueeze(1)), self.B)
        return LowRank(wide.reshape(-1, count * rank), self.A.reshape(-1, self.A.shape[2]), self.scale)

    def dense(self) -> Tensor:
        return self.narrow().dense()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return self.narrow().apply(x, layout)
        dtype = compute_dtype(x, self.A.dtype)
        count, rows, rank = self.B.shape
        z = layout.project(x, self.A.reshape(count * rank, -1).to(dtype)) * self.scale  # (…, E·r)
        flat = z.reshape(-1, count, rank).transpose(0, 1)  # (E, T, r)
        y = torch.bmm(flat, self.B.to(dtype).transpose(1, 2))  # (E, T, m/G)
        parts, zeros = iter(y), y.new_zeros(())
        whole = [next(parts) if on else zeros.expand(flat.shape[1], rows) for on in self.enabled]
        return torch.cat(whole, dim=1).reshape(*x.shape[:-1], -1)


@narrow_form(RowBlocks)
def _(operator: RowBlocks) -> LowRank:
    return operator.narrow()


@register("parameterization")
class FusedLoRA(Additive):
    """W' = W + LoRA on the enabled row blocks.

    Args:
        site: the layer.
        enabled: for each of the G equal row blocks whether it gets an update.
        rank, alpha, scale, dropout: of each block's LoRA.
    """

    facts = Facts(layouts=frozenset({"linear", "conv"}))

    def __init__(
        self,
        site: Site,
        *,
        enabled: Sequence[bool],
        rank: int = 8,
        alpha: float | None = None,
        scale: str = "lora",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.enabled, self.dropout, self.thin = tuple(map(bool, enabled)), dropout, site.thin
        self.count, self.scale = sum(self.enabled), scale_of(scale, alpha, rank)
        self.rank, self.inner = rank * self.count, rank
        self.fused_B = nn.Parameter(site.zeros(site.m // len(self.enabled) * self.count, rank))  # (m/G·E, r)
        self.fused_A = nn.Parameter(site.uniform(rank * self.count, site.n, bound=1.0 / math.sqrt(site.n)))  # (r·E, n)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"fused_A", "fused_B"})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # each block has its own rank, see `problems_at`

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        blocks, rank = len(arguments["enabled"]), arguments.get("rank", 8)
        fits = blocks > 0 and any(arguments["enabled"]) and site.m % blocks == 0
        if fits and 1 <= rank <= min(site.m // blocks, site.n):
            return []
        return [
            Problem(
                piece="FusedLoRA",
                needs="at least one enabled block, outputs that divide into the blocks, and a rank that fits one block",
                has=f"fused={tuple(arguments['enabled'])} and rank {rank} on a layer of {site.m} × {site.n}",
                remedy="say which of the equal parts get an update, (True, False, True) for q and v of a fused q, k, v",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        B = self.fused_B.reshape(self.count, -1, self.inner)
        update = RowBlocks(B, self.fused_A.reshape(self.count, self.inner, -1), self.enabled, self.scale)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update
