"""GraLoRA: the weight is split into k × k blocks, each with a small LoRA of its own.

    update[block (j, i)] = s · (A_i[:, jq:(j+1)q] B_j[iq:(i+1)q])ᵀ          A (k, n/k, r), B (k, r, m/k) trained; q = r/k

i counts blocks of inputs, j blocks of outputs. B starts at zero and A kaiming-uniform U(±√(k/n)), so W' = W; s = alpha / (r +
hybrid_rank). With `hybrid_rank` an ordinary LoRA of that rank, under the same s, is added. Trained numbers and FLOPs are
those of LoRA at rank r, (r + hybrid_rank)(m + n) and twice as many per token, but the rank reaches k r: it is exactly LoRA of
rank k r with factors that are mostly zeros. What one block of inputs does, outliers included, stays in its own A_i. k divides
m, n and r.

Per token: z_i = x_i A_i; its parts (i, j) become (j, i); y_j = (z_1j … z_kj) B_j. *Differs* from PEFT: inputs of any number
of dimensions, convolutions and embeddings.

Jung et al.: GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, 2025, arXiv:2505.20355.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Dropped, Sum
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, Operator, compute_dtype
from rankwise.core.parameterization import Additive, Site
from rankwise.core.piece import register
from rankwise.core.queries import narrow_form


class Granular(Operator):
    """scale times a grid of k × k low-rank blocks; block_A (k, n/k, r), block_B (k, r, m/k)."""

    def __init__(self, block_A: Tensor, block_B: Tensor, scale: float) -> None:
        self.block_A, self.block_B, self.scale = block_A, block_B, scale

    @property
    def shape(self) -> tuple[int, int]:
        k, rows, _ = self.block_A.shape
        return k * self.block_B.shape[2], k * rows

    def factors(self) -> LowRank:
        """The exact pair of rank k r; inner channel (i, j, q) joins input block i and output block j."""
        (k, rows, r), columns = self.block_A.shape, self.block_B.shape[2]
        parts_A = self.block_A.reshape(k, rows, k, r // k)  # (i, n/k, j, q)
        parts_B = self.block_B.reshape(k, k, r // k, columns)  # (j, i, q, m/k)
        one = torch.eye(k, dtype=parts_A.dtype, device=parts_A.device)
        A = torch.einsum("icjq,ib->ijqbc", parts_A, one).reshape(k * r, k * rows)
        B = torch.einsum("jiqc,jb->bcijq", parts_B, one).reshape(k * columns, k * r)
        return LowRank(B, A, self.scale)

    def dense(self) -> Tensor:
        (k, rows, r), columns = self.block_A.shape, self.block_B.shape[2]
        parts_A = self.block_A.reshape(k, rows, k, r // k)
        parts_B = self.block_B.reshape(k, k, r // k, columns)
        return torch.einsum("icjq,jiqd->jdic", parts_A, parts_B).reshape(self.shape) * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return self.factors().apply(x, layout)
        dtype, (k, rows, r), tokens = compute_dtype(x, self.block_A.dtype), self.block_A.shape, math.prod(x.shape[:-1])
        parts = x.to(dtype).reshape(tokens, k, rows).transpose(0, 1)  # (k, T, n/k)
        z = torch.bmm(parts, self.block_A.to(dtype)).reshape(k, tokens, k, r // k)  # (i, T, j, q)
        z = z.permute(2, 1, 0, 3).reshape(k, tokens, r)  # (j, T, (i, q))
        y = torch.bmm(z if self.scale == 1.0 else z * self.scale, self.block_B.to(dtype))  # (k, T, m/k)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.shape[0])


@narrow_form(Granular)
def _(operator: Granular) -> LowRank | None:
    return operator.factors()


@register("parameterization")
class GraLoRA(Additive):
    """W' = W + s times a grid of k × k low-rank blocks (+ s · B A).

    Args:
        site: the layer.
        rank: r, of which each block has r/k.
        alpha: numerator of the scale s.
        blocks: k.
        hybrid_rank: rank of an ordinary LoRA beside the blocks; 0 for none.
        dropout: probability of dropping an input of the update's branch.
    """

    block_A: Tensor
    block_B: Tensor
    A: Tensor
    B: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 32,
        alpha: float = 64.0,
        blocks: int = 2,
        hybrid_rank: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.blocks, self.hybrid_rank = rank, blocks, hybrid_rank
        self.scale, self.dropout, self.thin = alpha / (rank + hybrid_rank), dropout, site.thin
        for role, factor in self._draw(site).items():
            self.register_parameter(role, nn.Parameter(factor))

    def _draw(self, site: Site) -> dict[str, Tensor]:
        k, r, hybrid = self.blocks, self.rank, self.hybrid_rank
        factors = {
            "block_A": site.uniform(k, site.n // k, r, bound=math.sqrt(k / site.n)),
            "block_B": site.zeros(k, r, site.m // k),
        }
        if hybrid:
            factors["A"] = site.uniform(hybrid, site.n, bound=1 / math.sqrt(site.n), purpose="hybrid")
            factors["B"] = site.zeros(site.m, hybrid)
        return factors

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"block_A", "block_B"} | ({"A", "B"} if arguments.get("hybrid_rank") else set()))

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        rank, k, hybrid = arguments.get("rank", 32), arguments.get("blocks", 2), arguments.get("hybrid_rank", 0)
        found = []
        if k < 1 or site.m % k or site.n % k or rank % k:
            fits = [str(d) for d in range(1, max(1, rank) + 1) if not (site.m % d or site.n % d or rank % d)]
            has = f"blocks is {k} for m = {site.m}, n = {site.n}, rank {rank}"
            found.append(("blocks that divide m, n and rank", has, f"possible here: {', '.join(fits)}"))
        if hybrid < 0:
            found.append(("hybrid_rank >= 0", f"it is {hybrid}", "use 0 for none"))
        return [
            Problem(piece="gralora", needs=needs, has=has, remedy=remedy, sites=(site.name,)) for needs, has, remedy in found
        ]

    def update(self) -> Operator:
        update: Operator = Granular(self.block_A, self.block_B, self.scale)
        if self.hybrid_rank:
            update = Sum(LowRank(self.B, self.A, self.scale), update)  # that one joins the frozen layer
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def restart(self, site: Site) -> None:
        for role, factor in self._draw(site).items():
            getattr(self, role).copy_(factor)
