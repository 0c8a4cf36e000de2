"""Shares of a batch: rows that each belong to one of several heads, in one process or in several."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.core.errors import CheckpointError, TrainingError
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Site


class Shares(Operator):
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


def orthogonal(site: Site, rank: int, head: int) -> Tensor:
    """A (r, n) of a head: rows orthonormal, times √(n/r)."""
    if site.blank:
        return site.zeros(rank, site.n)
    drawn = site.normal(site.n, rank, purpose=f"head {head}")  # (n, r)
    Q, R = torch.linalg.qr(drawn.double())
    return site.cast((Q * R.diagonal().sign()).T * math.sqrt(site.n / rank)).contiguous()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def process() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if _running() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if _running() else 1


def gathered(own: Tensor) -> Tensor:
    """The heads of all processes, in their order."""
    if not _running():
        return own
    parts = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def own_heads(heads: int, total: int) -> slice:
    """Where the heads of this process stand among all.

    Raises:
        TrainingError: these are the heads of another number of processes.
    """
    if total != heads * processes():
        raise TrainingError(
            f"this adapter was trained by {total // heads} processes with {heads} heads each, and here are {processes()}; go "
            "on with as many as before, or merge_() it and train a new one on the result"
        )
    return slice(process() * heads, (process() + 1) * heads)


def check_merged(own: Tensor, first: int, wanted: int) -> None:
    """Checks that another process's file knows the heads of this one.

    Raises:
        CheckpointError: there was no merge yet.
    """
    if not own.any():
        raise CheckpointError(
            f"this was saved by the process with heads {first} and following, before a first merge, so it knows nothing of the "
            f"heads from {wanted} on; save after a merge, or load in each process what it saved itself"
        )
