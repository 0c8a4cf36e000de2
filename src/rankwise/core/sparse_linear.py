"""A frozen linear layer with a few weight entries changed, in one product, and its gradient at those entries alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.handwritten import Handwritten, Tensors

_DENSE_FROM = 6  # on a CPU one entry of a sampled product takes as long as about six of the whole one


class SparseLinear(Handwritten):
    """(x, W, b, values, flat) -> (W + values at flat) x + b; flat are positions in W read row by row."""

    def _matrix(self, weight: Tensor, values: Tensor, flat: Tensor) -> Tensor:
        return weight.reshape(-1).index_add(0, flat, values.to(weight.dtype)).view(weight.shape)

    def plain(self, *tensors: Any) -> Tensor:
        """By a copy of W with the values added."""
        x, weight, bias, values, flat = tensors
        return F.linear(x, self._matrix(weight, values, flat), bias)

    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        """Of x by the copy made again, of the values by `product_at`."""
        x, weight, _, values, flat = tensors
        x_gradient = gradient @ self._matrix(weight, values, flat) if needs[0] else None  # (…, n)
        g, rows = gradient.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])  # (T, m), (T, n)
        return x_gradient, None, None, product_at(g, rows, flat) if needs[3] else None, None


def product_at(g: Tensor, x: Tensor, flat: Tensor) -> Tensor:
    """(gᵀ x) at flat positions (K,), for g (T, m) and x (T, n).

    Sorted positions that are few are K dot products; otherwise the whole product is made, which is then faster.
    """
    (m, n), count = (g.shape[1], x.shape[1]), flat.shape[0]
    few = g.dtype in (torch.float32, torch.float64) and count * _DENSE_FROM < m * n
    if not few or not g.shape[0] or not bool((flat[1:] >= flat[:-1]).all()):
        return (g.t() @ x).reshape(-1).index_select(0, flat)
    rows = torch.div(flat, n, rounding_mode="floor")
    starts = torch.searchsorted(rows, torch.arange(m + 1, device=flat.device))
    with warnings.catch_warnings():  # torch says once that sparse rows are in beta
        warnings.simplefilter("ignore", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, flat - rows * n, g.new_zeros(count), (m, n), check_invariants=False)
        left, right = g.t().contiguous(), x.t().contiguous().t()  # tokens side by side in memory
        return torch.sparse.sampled_addmm(pattern, left, right, beta=0).values()
