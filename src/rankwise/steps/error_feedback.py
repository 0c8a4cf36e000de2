"""Error feedback of one matrix: what a compressor left out is kept, and added to what it is given next.

    p = G + (1 - β) ẽ       send Q(p)       e = p - Q(p)       ẽ <- β ẽ + e, kept exactly, as a sketch, or as means of buckets

G is (m, n); Q(p) is the worker's own, never the mean of all. A sketch is updated by Sk(e - (1 - β) ẽ): along the direction in
which its c columns agree, a bucket then feeds back exactly what it took in, while shrinking each bucket once by β would feed
back c times too much. That is stable while c (1 - β) < 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, did_you_mean
from rankwise.steps.compressors import COMPRESSORS, Exchange, Kept, start_of
from rankwise.steps.count_sketch import CountSketch
from rankwise.steps.grams import at_least_single

MEMORIES = ("sketch", "exact", "means")


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """Compressor and memory; `conef` documents the arguments."""

    compressor: str
    share: float
    rank: int
    ratio: float
    smoothing: float
    memory: str
    start: int
    seed: int

    def __post_init__(self) -> None:
        if self.compressor not in COMPRESSORS:
            raise ArgumentError(
                f"conef: there is no compressor {self.compressor!r}. {did_you_mean(self.compressor, COMPRESSORS)}"
            )
        if self.memory not in MEMORIES:
            raise ArgumentError(f"conef: memory is one of {', '.join(MEMORIES)}, not {self.memory!r}")
        if not (0.0 < self.share <= 1.0 and 0.0 < self.ratio <= 1.0 and 0.0 <= self.smoothing < 1.0):
            raise ArgumentError(
                f"conef needs share and ratio in (0, 1] and smoothing in [0, 1), not share={self.share}, ratio={self.ratio}, "
                f"smoothing={self.smoothing}"
            )
        if self.rank < 1 or self.start < 0:
            raise ArgumentError(f"conef needs rank >= 1 and start >= 0, not rank={self.rank}, start={self.start}")

    def sketch_for(self, rows: int, columns: int) -> CountSketch:
        """The sketch of an (m, n) matrix's error."""
        return CountSketch(rows, columns, max(1, int(self.ratio * columns)), self.seed, means=self.memory == "means")

    def init(self, tensor: Tensor, key: str) -> Kept:
        """The state of a tensor; nothing but counters where there is nothing to compress."""
        if tensor.dim() < 2:
            return {}
        rows, columns = tensor.shape[0], tensor.numel() // tensor.shape[0]
        like = at_least_single(
            torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        )  # a plain tensor, however it is sharded
        kept = {"step": torch.zeros((), dtype=torch.float32)}
        if self.compressor == "powersgd":
            kept["Q"] = start_of(rows, columns, self.rank, self.seed, key, like)  # (n, r)
        if self.memory == "exact":
            return kept | {"memory": like.new_zeros(rows, columns)}
        sketch = self.sketch_for(rows, columns)
        return kept | {"memory": like.new_zeros(rows, sketch.width)}

    def exchange(self, gradient: Tensor, kept: Kept, key: str) -> Exchange:
        """One step of a matrix: yields what to send, is sent the mean, returns this worker's and the mean gradient."""
        kept["step"] += 1
        if int(kept["step"]) <= self.start:
            return gradient, (yield gradient)
        matrix = at_least_single(gradient).reshape(gradient.shape[0], -1)
        rows, columns = matrix.shape
        exact = self.memory == "exact"
        sketch = None if exact else self.sketch_for(rows, columns)
        error = kept["memory"] if sketch is None else sketch.query(kept["memory"])  # ẽ, (m, n)
        p = matrix.add(error, alpha=1.0 - self.smoothing)  # (m, n)
        compress = COMPRESSORS[self.compressor]
        own, mean = yield from compress(p, kept, share=self.share, rank=self.rank, seed=self.seed, key=key)
        change = (p - own).sub_(error, alpha=1.0 - self.smoothing)  # e - (1 - β) ẽ
        kept["memory"].add_(change if sketch is None else sketch.sketch(change))
        return own.view_as(gradient), mean.view_as(gradient)

    def alone(self, gradient: Tensor, kept: Kept, key: str) -> Tensor:
        """One step of a matrix where nobody else is there: the mean is what was sent."""
        exchange = self.exchange(gradient, kept, key)
        sent = next(exchange)
        while True:
            try:
                sent = exchange.send(sent)
            except StopIteration as finished:
                return finished.value[1]
