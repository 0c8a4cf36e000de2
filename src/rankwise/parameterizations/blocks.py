"""What the two forms of Bone have in common: tiled identities, divisors, and how a problem is told."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import Problem
from rankwise.core.parameterization import Site

LAYOUTS = frozenset({"linear", "conv"})


def tiled_identity(like: Tensor, r: int, n: int) -> Tensor:
    """(r, n): identities (r, r) side by side, cut at n columns; dtype and device of `like`."""
    return torch.eye(r, dtype=like.dtype, device=like.device).repeat(1, -(-n // r))[:, :n]


def largest_divisor(wanted: int, *sizes: int) -> int:
    """The largest number up to `wanted` that divides all sizes."""
    return next(number for number in range(max(1, wanted), 0, -1) if not any(size % number for size in sizes))


def problem(site: Site, needs: str, has: str, remedy: str) -> Problem:
    """A problem of bone at one site."""
    return Problem(piece="bone", needs=needs, has=has, remedy=remedy, sites=(site.name,))
