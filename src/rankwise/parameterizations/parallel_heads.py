"""LTE's layer: several low-rank heads beside one main weight, each on its own share of the batch.

    head h:  y = (W + D̄ + D_h - D_h^m) x          D_h = s·B_h A_h;  B_h (m, r) from 0, A_h (r, n) orthogonal · √(n/r)
    main:    W' = W + D̄,  D̄ = (1/H) Σ_h D_h^m     D_h^m: D_h as it was at the last merge, kept as factors

In training the rows of a batch (its first dimension) are cut into H shares of equal size, in order. A merge takes the heads'
present factors over into D_h^m: every head then acts as the main weight does, optimizer states go on, and the main weight is
what the average of the products says, never the product of averages. With `reset` the average is absorbed into what is carried,
and every B_h begins at zero again: the rank can then grow beyond H r. In evaluation the main weight acts alone.

Where torch.distributed runs, each process holds H of H · world heads, cuts its own batch among them, and a merge gathers the
factors of all: H r (m + n) numbers per process and merge instead of mn per step. Do not wrap the model (DDP) then. A file holds
the heads of the process that wrote it, and what all heads were at the last merge: a process that loads another's file begins
with its own heads of that merge. On another number of processes the main weight can be used, but not trained on.

Trained numbers H r (m + n), of one process. A head costs 4r(m + n) FLOPs per token, twice LoRA's, and the main update what is
cheaper of its factors and a dense (m, n). Exactly a LoRA of rank min(H r, m, n).

*Differs* from the release: D_h^m is kept as factors, not as an (m, n) matrix per head; the loss is that of the whole batch, so
a head's gradient is that of its share times its share of the loss (1/H for a mean, which Adam does not see).

Huh, Cheung, Bernstein, Isola, Agrawal: Training Neural Networks from Scratch with Parallel Low-Rank Adapters, 2024,
arXiv:2402.16828.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.parameterizations.shares import Shares, check_merged, gathered, orthogonal, own_heads, process, processes


@register("parameterization")
class ParallelHeads(Additive):
    """W' = W + the mean of the heads' updates at the last merge; in training each head acts on its share of the batch.

    Args:
        site: the layer.
        rank: r of a head.
        heads: H, of this process.
        alpha: numerator of s = alpha / r.
    """

    facts = Facts(
        same_in_evaluation=False,
        expected_failures=dict.fromkeys(
            ("training_mode_equals_eval", "merge_equals_forward", "scale_is_applied"),
            "in training the heads act as they are, in evaluation and in the update as they were at the last merge",
        ),
    )
    merged_A: Tensor
    merged_B: Tensor
    first: Tensor

    def __init__(self, site: Site, *, rank: int = 32, heads: int = 32, alpha: float = 4096.0) -> None:
        super().__init__()
        if heads < 1:
            raise ArgumentError(f"lte: heads is at least 1, not {heads}")
        self.rank, self.heads, self.scale, self.frozen = rank, heads, alpha / rank, site.weight
        first, total = (process() * heads, processes() * heads)
        drawn = torch.stack([orthogonal(site, rank, first + h) for h in range(heads)])  # (H, r, n)
        self.A_heads = nn.Parameter(drawn)
        self.B_heads = nn.Parameter(torch.stack([site.zeros(site.m, rank)] * heads))  # (H, m, r)
        self.register_buffer("merged_A", torch.zeros(total, *drawn.shape[1:], dtype=drawn.dtype, device=drawn.device))
        self.register_buffer("merged_B", torch.zeros(total, site.m, rank, dtype=drawn.dtype, device=drawn.device))
        self.register_buffer("first", torch.tensor(first))  # head of this process among all
        self.register_load_state_dict_post_hook(_filled)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"A_heads", "B_heads"})

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"merge"})

    def update(self) -> Operator:
        total, m, r = self.merged_B.shape
        B = self.merged_B.transpose(0, 1).reshape(m, total * r)  # (m, H r)
        return LowRank(B, self.merged_A.reshape(total * r, -1), self.scale / total)

    def forward(self, base: Operator) -> Operator:
        main = self.update()
        (m, n), width = main.shape, self.merged_A.shape[0] * self.rank
        if width * (m + n) >= m * n:
            main = Dense(main.dense())
        if not self.training:
            return Sum(base, main)
        own = self._own()
        B = torch.cat([self.B_heads, -self.merged_B[own]], dim=2)  # (H, m, 2r)
        A = torch.cat([self.A_heads, self.merged_A[own]], dim=1)  # (H, 2r, n)
        return Sum(base, main, Shares(B, A, self.scale))

    def _own(self) -> slice:
        """Where the heads of this process stand among all."""
        return own_heads(self.heads, len(self.merged_A))

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in ("merged_A", "merged_B"):
            here = getattr(self, name)
            if name in shapes and shapes[name] != tuple(here.shape):
                setattr(self, name, here.new_zeros(shapes[name]))

    @torch.no_grad()
    def filled(self, weight: Tensor) -> None:
        """Of another process's file, the heads of the last merge are taken."""
        if len(self.merged_A) != self.heads * processes() or int(self.first) == process() * self.heads:
            return
        own = self._own()
        check_merged(self.merged_A[own], int(self.first), own.start)
        self.A_heads.copy_(self.merged_A[own])
        self.B_heads.copy_(self.merged_B[own])
        self.first.fill_(own.start)

    def head_weight(self, head: int) -> Tensor:
        """What one head of this process acts with now (m, n)."""
        own = process() * self.heads + head
        change = self.B_heads[head] @ self.A_heads[head] - self.merged_B[own] @ self.merged_A[own]
        return self.frozen() + self.total_update(Dense(self.frozen())).dense() + self.scale * change

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        """Takes the factors of all heads over into the main weight; with `reset`, every B_h begins again."""
        self.merged_A.copy_(gathered(self.A_heads.detach()))
        self.merged_B.copy_(gathered(self.B_heads.detach()))
        if not arguments["reset"]:
            return {}
        merged = self.update()
        if not isinstance(merged, LowRank):
            raise TypeError("heads without factors; this is a bug in rankwise")
        self.carry(merged, absorbed=False)
        self.merged_B.zero_()
        self.B_heads.zero_()
        return {"B_heads": None}


def _filled(entry: ParallelHeads, _: object) -> None:
    entry.filled(entry.merged_A)
