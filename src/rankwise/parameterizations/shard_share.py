"""MiSS (Bone's later form): inputs are summed in shards of stride r, and one matrix maps the sums to the outputs.

    miss   W'[o, c] = W[o, c] + D[c mod r, o]                 D (r, m)
    mini   W'[o, c] = W[o, c] + D[c mod r, o mod q]           D (r, q), q divides m

D starts at zero, so W' = W; y gains Dᵀ S(x) with S(x)_k = Σ_j x_{jr + k}, inputs padded with zeros to a multiple of r. The sum
runs over indices r apart, not over neighbors. Exactly LoRA with B = Dᵀ and A = [I I …] cut at n columns, at n + 2rm FLOPs per
token instead of 2r(m + n). Trained numbers r m, or r q. No α and no scale. The learning rate is that of full fine-tuning,
since D meets sums of n/r inputs. In a convolution n counts channels · kernel.

Kang: Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models, 2024,
arXiv:2409.15371 (later versions: DiSHA, then MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.core.combinators import Dropped
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, Operator, compute_dtype
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.queries import narrow_form
from rankwise.parameterizations.blocks import LAYOUTS, largest_divisor, problem, tiled_identity


class ShardSum(Operator):
    """B S: B (m, r) after S (r, n), which sums the inputs whose index is the same modulo r."""

    def __init__(self, B: Tensor, n: int) -> None:
        self.B, self.n = B, n

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.n

    def factors(self) -> LowRank:
        """The exact pair: B, and identities side by side, cut at n columns."""
        return LowRank(self.B, tiled_identity(self.B, self.B.shape[1], self.n))

    def dense(self) -> Tensor:
        return self.B[:, torch.arange(self.n, device=self.B.device) % self.B.shape[1]]

    def _pool(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, -self.n % self.B.shape[1])) if self.n % self.B.shape[1] else x
        return padded.reshape(*x.shape[:-1], -1, self.B.shape[1]).sum(-2)  # (…, r)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return self.factors().apply(x, layout)
        dtype = compute_dtype(x, self.B.dtype)
        return layout.expand(self._pool(x).to(dtype), self.B.to(dtype))

    def add_to(self, y: Tensor, x: Tensor, layout: Layout) -> Tensor:
        if not isinstance(layout, LinearLayout):
            return super().add_to(y, x, layout)
        pooled = self._pool(x).to(y.dtype).reshape(-1, self.B.shape[1])  # (T, r)
        return torch.addmm(y.reshape(-1, y.shape[-1]), pooled, self.B.to(y.dtype).t()).reshape(y.shape)


@narrow_form(ShardSum)
def _(operator: ShardSum) -> LowRank | None:
    return operator.factors()


@register("parameterization")
class ShardShare(Additive):
    """W' = W + Dᵀ S, miss and mini.

    Args:
        site: the layer.
        rank: r, how many sums of inputs D meets.
        width: q, after how many outputs D repeats (mini); None means never (miss).
        dropout: probability of dropping an input of the update's branch.
    """

    facts = Facts(layouts=LAYOUTS)

    def __init__(self, site: Site, *, rank: int = 64, width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.rank, self.m, self.n, self.dropout, self.thin = rank, site.m, site.n, dropout, site.thin
        self.D = nn.Parameter(site.zeros(rank, site.m if width is None else width))  # (r, m) or (r, q)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"D"})

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # bounded by n alone, see problems_at

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        rank, width, found = arguments.get("rank", 64), arguments.get("width"), []
        if not 1 <= rank <= site.n:
            found.append(problem(site, f"1 <= rank <= n = {site.n}", f"rank is {rank}", f"use rank={site.n} or less"))
        if width is not None and (width < 1 or site.m % width):
            remedy = f"use a divisor of {site.m}, such as width={largest_divisor(width, site.m)}, or mode='miss'"
            found.append(problem(site, "a width that divides the outputs", f"{site.m} outputs, width {width}", remedy))
        return found

    def update(self) -> Operator:
        repeats = self.m // self.D.shape[1]
        B = self.D.t() if repeats == 1 else self.D.t().repeat(repeats, 1)  # (m, r)
        update = ShardSum(B, self.n)
        return Dropped(update, self.dropout, self.thin) if self.training and self.dropout and self.thin else update

    def restart(self, site: Site) -> None:
        self.D.zero_()
