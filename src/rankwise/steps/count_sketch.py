"""A count sketch: each row of a matrix in fewer numbers, linear, unbiased over its signs, its hashes computed and never stored.

    Sk(V)[i, b] = Σ_{j: h(j) = b} s(j) V[i, j]            query(mem)[i, j] = s(j) mem[i, h(j)]

V is (rows, columns), the sketch (rows, width); h sends a column to a bucket and s gives it a sign, the same for all rows. For a
fixed hash query ∘ Sk has the eigenvalues c_b, the number of columns in bucket b, and 0; over random signs it is the identity
in the mean, with E‖query(Sk v) - v‖² = ‖v‖² (columns - 1)/width. Where the width holds all columns, each has a bucket to
itself and nothing is lost. `means=True` keeps the mean of the signed entries of a bucket instead of their sum: query ∘ Sk is
then an orthogonal projection, biased, but never longer than what it is given.

Charikar, Chen, Farach-Colton: Finding Frequent Items in Data Streams, 2002.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError

_LOW = 0xFFFFFFFF  # the hash works on 32 bits kept in 64


class CountSketch:
    """One pair of hashes.

    Args:
        rows: of the matrices to sketch.
        columns: of the matrices to sketch.
        width: buckets per row.
        seed: of the hashes; the same on every process and device.
        means: keep means of buckets instead of sums.

    Raises:
        ArgumentError: a size below 1.
    """

    def __init__(self, rows: int, columns: int, width: int, seed: int = 0, *, means: bool = False) -> None:
        if min(rows, columns, width) < 1:
            raise ArgumentError(f"a count sketch needs rows, columns and width >= 1, not {rows}, {columns}, {width}")
        self.rows, self.columns, self.width, self.seed, self.means = rows, columns, width, int(seed), means

    def sketch(self, V: Tensor) -> Tensor:
        """(rows, columns) -> (rows, width)."""
        buckets, signs = self._hashes(V)
        sums = V.new_zeros(V.shape[0], self.width).index_add_(1, buckets, V * signs)
        return sums / self.sizes(V.device).clamp_min(1).to(V.dtype) if self.means else sums

    def query(self, memory: Tensor) -> Tensor:
        """(rows, width) -> (rows, columns)."""
        buckets, signs = self._hashes(memory)
        return memory[:, buckets] * signs

    def sizes(self, device: torch.device | str = "cpu") -> Tensor:
        """How many columns each bucket holds, (width,)."""
        buckets = self._buckets(torch.arange(self.columns, device=device))
        return torch.zeros(self.width, dtype=torch.long, device=device).index_add_(0, buckets, torch.ones_like(buckets))

    def _hashes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket h and sign s of every column, each (columns,)."""
        places = torch.arange(self.columns, device=like.device)
        signs = 1 - 2 * ((_mixed(places, 2 * self.seed + 1) >> 7) & 1)
        return self._buckets(places), signs.to(like.dtype)

    def _buckets(self, places: Tensor) -> Tensor:
        return places if self.width >= self.columns else _mixed(places, 2 * self.seed) % self.width


def _mixed(places: Tensor, key: int) -> Tensor:
    """32 well-mixed bits for each place, by two rounds of xor-shifts and multiplications."""
    mixed = (places * 0x9E3779B1 + (key * 0x632BE59B & _LOW) + 0x2545F491) & _LOW
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _LOW
        mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _LOW
    return mixed ^ (mixed >> 16)
