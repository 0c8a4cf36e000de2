"""The operator s · B A + S, S sparse with fixed places, applied as one matrix that backward makes again instead of keeping it.

Making it takes 2mnr FLOPs however many tokens there are, against 2Tr(m + n) for the factors and a sparse product on T tokens,
which on today's hardware is no faster than a whole one. Where the frozen weight is computed with in full precision the sum is
made with it, so that x meets one matrix only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.core.handwritten import RemadeLinear, Tensors, frozen_linear, sums_in_full
from rankwise.core.layouts import Layout
from rankwise.core.operators import Base, Operator, compute_dtype


class _Linear(RemadeLinear):
    """(x, W, b, B, A, values, indices) -> (W + s · B A + S) x + b; without W the sum is the matrix."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def make(self, weight: Tensor | None, *factors: Any) -> tuple[Tensor, Any]:
        B, A, values, indices = factors
        like = values if weight is None else weight  # without W in the masters' precision, rounded once, at the end
        B, A, values = B.to(like.dtype), A.to(like.dtype), values.to(like.dtype)
        matrix = (B * self.scale) @ A if weight is None else torch.addmm(weight, B, A, alpha=self.scale)  # (m, n)
        matrix.view(-1).index_add_(0, _flat(indices, matrix.shape[1]), values)  # it is fresh, and no gradient needs it
        return matrix, None

    def pull(self, G: Tensor, made: Any, weight: Tensor | None, *factors: Any) -> Tensors:
        B, A, values, indices = factors
        entries = G.reshape(-1).index_select(0, _flat(indices, G.shape[1]))  # (K,)
        G = G.to(B.dtype)
        return (G @ A.t()).mul_(self.scale), (B.t() @ G).mul_(self.scale), entries.to(values.dtype), None


class LowRankPlusSparse(Operator):
    """s · B A + S, B (m, r), A (r, n), S the values (K,) at indices (2, K), rows and columns, without repetition."""

    def __init__(self, B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float = 1.0) -> None:
        self.B, self.A, self.values, self.indices, self.scale = B, A, values, indices, scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        return _Linear(self.scale).make(None, self.B, self.A, self.values, self.indices)[0]

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.kind != "linear":
            return super().apply(x, layout)
        x = x.to(compute_dtype(x, self.B.dtype))
        return _Linear(self.scale)(x, None, None, self.B, self.A, self.values, self.indices).to(x.dtype)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        frozen = frozen_linear(base, x, layout, bias)
        if frozen is None or not sums_in_full(frozen[0]):
            return None
        return _Linear(self.scale)(*frozen, self.B, self.A, self.values, self.indices)


def _flat(indices: Tensor, n: int) -> Tensor:
    """Positions (K,) in the matrix read row by row; 64 bits, since a large matrix has more entries than 32 bits count."""
    return indices[0].long() * n + indices[1]


def random_places(m: int, n: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows and columns (2, count) of different entries of an (m, n) matrix, drawn uniformly, sorted row by row."""
    if 2 * count > m * n:
        flat = torch.randperm(m * n, generator=generator)[:count].sort().values
    else:  # the first different numbers of a stream: much less memory than a permutation of all
        flat = torch.empty(0, dtype=torch.int64)
        while flat.numel() < count:
            flat = torch.cat([flat, torch.randint(m * n, (count - flat.numel(),), generator=generator)]).unique()
    return torch.stack([flat // n, flat % n]).to(torch.int32)
