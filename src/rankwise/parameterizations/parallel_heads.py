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

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError, CheckpointError, TrainingError
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register


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
        expected_failures=dict.fromkeys(
            ("training_mode_equals_eval", "merge_equals_forward", "scale_is_applied"),
            "in training the heads act as they are, in evaluation and in the update as they were at the last merge",
        )
    )
    merged_A: Tensor
    merged_B: Tensor
    first: Tensor

    def __init__(self, site: Site, *, rank: int = 32, heads: int = 32, alpha: float = 4096.0) -> None:
        super().__init__()
        if heads < 1:
            raise ArgumentError(f"lte: heads is at least 1, not {heads}")
        self.rank, self.heads, self.scale, self.frozen = rank, heads, alpha / rank, site.weight
        first, total = (_process() * heads, _processes() * heads)
        drawn = torch.stack([_orthogonal(site, rank, first + h) for h in range(heads)])  # (H, r, n)
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
        return Sum(base, main, _Shares(B, A, self.scale))

    def _own(self) -> slice:
        """Where the heads of this process stand among all."""
        if len(self.merged_A) != self.heads * _processes():
            raise TrainingError(
                f"this adapter was trained by {len(self.merged_A) // self.heads} processes with {self.heads} heads each, and here "
                f"are {_processes()}; go on with as many as before, or merge_() it and train a new one on the result"
            )
        return slice(_process() * self.heads, (_process() + 1) * self.heads)

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in ("merged_A", "merged_B"):
            here = getattr(self, name)
            if name in shapes and shapes[name] != tuple(here.shape):
                setattr(self, name, here.new_zeros(shapes[name]))

    @torch.no_grad()
    def filled(self, weight: Tensor) -> None:
        """Of another process's file, the heads of the last merge are taken.

        Raises:
            CheckpointError: there was no merge yet.
        """
        first, total = _process() * self.heads, self.heads * _processes()
        if int(self.first) == first or len(self.merged_A) != total:
            return
        own = slice(first, first + self.heads)
        if not self.merged_A[own].any():
            raise CheckpointError(
                f"this was saved by the process with heads {int(self.first)} and following, before a first merge, so it knows "
                f"nothing of the heads from {first} on; save after a merge, or load in each process what it saved itself"
            )
        self.A_heads.copy_(self.merged_A[own])
        self.B_heads.copy_(self.merged_B[own])
        self.first.fill_(first)

    def head_weight(self, head: int) -> Tensor:
        """What one head of this process acts with now (m, n)."""
        own = _process() * self.heads + head
        change = self.B_heads[head] @ self.A_heads[head] - self.merged_B[own] @ self.merged_A[own]
        return self.frozen() + self.total_update(Dense(self.frozen())).dense() + self.scale * change

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        """Takes the factors of all heads over into the main weight; with `reset`, every B_h begins again."""
        self.merged_A.copy_(_gathered(self.A_heads.detach()))
        self.merged_B.copy_(_gathered(self.B_heads.detach()))
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


class _Shares(Operator):
    """Head h acts on share h of the rows; B (H, m, k), A (H, k, n)."""

    def __init__(self, B: Tensor, A: Tensor, scale: float) -> None:
        self.B, self.A, self.scale = B, A, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[1], self.A.shape[2]

    def dense(self) -> Tensor:
        if len(self.B) > 1:
            raise TrainingError(
                f"each of {len(self.B)} heads acts on other rows of the batch in training, so there is no one matrix; "
                "use binding='path', or eval()"
            )
        return self.scale * (self.B[0] @ self.A[0])

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        heads, rows = len(self.B), len(x)
        if rows % heads:
            raise TrainingError(
                f"a batch of {rows} rows cannot be cut into equal shares for {heads} heads; use a batch size that is a "
                "multiple of heads, or fewer heads"
            )
        if isinstance(layout, LinearLayout):
            shares = x.reshape(heads, -1, x.shape[-1])  # (H, T/H, n)
            z = torch.bmm(shares, self.A.to(x.dtype).transpose(1, 2)) * self.scale  # (H, T/H, k)
            return torch.bmm(z, self.B.to(x.dtype).transpose(1, 2)).reshape(*x.shape[:-1], -1)
        parts = [LowRank(B, A, self.scale) for B, A in zip(self.B, self.A, strict=True)]
        return torch.cat([part.apply(share, layout) for part, share in zip(parts, x.chunk(heads), strict=True)])


def _orthogonal(site: Site, rank: int, head: int) -> Tensor:
    """Rows orthonormal, times √(n/r): (r, n)."""
    if site.blank:
        return site.zeros(rank, site.n)
    drawn = site.normal(site.n, rank, purpose=f"head {head}")  # (n, r)
    Q, R = torch.linalg.qr(drawn.double())
    return site.cast((Q * R.diagonal().sign()).T * math.sqrt(site.n / rank)).contiguous()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _process() -> int:
    return dist.get_rank() if _running() else 0


def _processes() -> int:
    return dist.get_world_size() if _running() else 1


def _gathered(own: Tensor) -> Tensor:
    """The heads of all processes, in their order."""
    if not _running():
        return own
    parts = [torch.empty_like(own) for _ in range(_processes())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)
