"""What a worker sends of a matrix, so that one sum over all workers is enough: a block of entries, two thin factors, or all.

A compressor is a generator: it yields what this worker sends, is sent back the mean over all workers, and returns the worker's
own decompressed matrix and the mean of all workers'. Alone, the mean is what was sent. The workers draw from the same seed, so
that what they send may be added up.

block      a contiguous block of ⌊share · mn⌋ entries, cyclic, from a random entry on
powersgd   P = orth(mean p Q), Q = mean pᵀP: one step of subspace iteration, Q kept for the next (Vogels et al. 2019)
top        the ⌊share · mn⌋ largest entries. Each worker has others, so it is sent with all zeros: to study, not to save
none       everything
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from rankwise.core.randomness import generator_for
from rankwise.steps.random_projection import derived_seed, normals

Kept = dict[str, Tensor]  # the state of one matrix
Exchange = Generator[Tensor, Tensor, tuple[Tensor, Tensor]]  # sends, receives means, returns (own, mean), both (m, n)


def block(p: Tensor, kept: Kept, *, share: float, rank: int, seed: int, key: str) -> Exchange:
    """A contiguous cyclic block of entries of p (m, n), with the same random beginning on every worker."""
    size = max(1, int(share * p.numel()))
    generator = generator_for(seed, "block", key, int(kept["step"]))
    begin = int(torch.randint(p.numel(), (), generator=generator))
    places = (torch.arange(size, device=p.device) + begin) % p.numel()  # (k,)
    sent = p.reshape(-1)[places]  # (k,)
    mean = yield sent
    return _scattered(places, sent, p), _scattered(places, mean, p)


def powersgd(p: Tensor, kept: Kept, *, share: float, rank: int, seed: int, key: str) -> Exchange:
    """The part of p (m, n) in a subspace of r directions that follows its leading left singular vectors."""
    P = torch.linalg.qr((yield p @ kept["Q"])).Q  # (m, r)
    sent = p.mT @ P  # (n, r)
    mean = yield sent
    kept["Q"].copy_(mean)
    return P @ sent.mT, P @ mean.mT  # the worker's own part is in the same subspace, so that own parts average to the mean


def top(p: Tensor, kept: Kept, *, share: float, rank: int, seed: int, key: str) -> Exchange:
    """The largest entries of p (m, n)."""
    flat = p.reshape(-1)
    places = flat.abs().topk(max(1, int(share * flat.numel()))).indices  # (k,)
    own = _scattered(places, flat[places], p)
    return own, (yield own)


def none(p: Tensor, kept: Kept, *, share: float, rank: int, seed: int, key: str) -> Exchange:
    """All of p (m, n)."""
    return p, (yield p)


COMPRESSORS: dict[str, Callable[..., Exchange]] = {"block": block, "powersgd": powersgd, "top": top, "none": none}


def start_of(rows: int, columns: int, rank: int, seed: int, key: str, like: Tensor) -> Tensor:
    """The first Q of powersgd, (n, r), the same on every worker."""
    shape = (columns, min(rank, rows, columns))
    return normals(shape, derived_seed(seed, "powersgd", key), device=like.device, dtype=like.dtype)


def _scattered(places: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).reshape(-1).index_copy(0, places, values).view_as(like)
