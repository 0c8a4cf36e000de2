"""The operator of RandLoRA, s · B R or its transpose, where R is made of a small frozen A and two trained diagonals.

    R = rows Lambda[k, j] · A[k] ∘ Gamma[j]          A (r, w), Lambda (r, N), Gamma (N, w), R (Nr, w), B (v, Nr)

v = max(m, n), w = min(m, n), Nr from w on. With T tokens, in multiply-adds: by factors forward takes T Nr (v + w) and backward
T Nr (v + 2w). As one matrix M = W + s · B R forward takes vw Nr beside the product that W takes anyway, and backward, where
M is kept if it is no larger than the layer's input and output and made again elsewhere, the less of T Nr (v + w) and vw (T +
Nr) for the gradient of R. What is less over both is done. R is never kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.handwritten import Handwritten, Tensors, frozen_linear, sums_in_full
from rankwise.core.layouts import ConvLayout, Layout, LinearLayout
from rankwise.core.operators import Base, Dense, LowRank, Operator, compute_dtype


class _Linear(Handwritten):
    """(x, W or None, b or None, B, A, Lambda, Gamma) -> W x + b + s · D x."""

    def __init__(self, scale: float, *, paper: bool, tall: bool) -> None:
        self.scale, self.paper, self.tall = scale, paper, tall

    def rows(self, A: Tensor, Lambda: Tensor, Gamma: Tensor) -> Tensor:
        """R (Nr, w), in the order of the pairing."""
        left, middle, right = (Lambda.t()[:, :, None], A, Gamma[:, None, :])  # rows in order (j, k)
        if not self.paper:  # (k, j)
            left, middle, right = Lambda[:, :, None], A[:, None, :], Gamma
        return (left * middle * right).flatten(0, 1)

    def matrix(self, weight: Tensor | None, B: Tensor, R: Tensor) -> Tensor:
        """W + s · D (m, n)."""
        left, right = (B, R) if self.tall else (R.t(), B.t())
        return (left @ right) * self.scale if weight is None else torch.addmm(weight, left, right, alpha=self.scale)

    def whole(self, tokens: int, B: Tensor, A: Tensor, *, trained: bool) -> bool:
        """Whether the matrix is less work than the factors."""
        (v, inner), w = B.shape, A.shape[1]
        if not trained:
            return v * w < tokens * (v + w)
        again = 0 if self._keeps(tokens, v, w) else v * w * inner
        as_matrix = v * w * inner + again + min(tokens * inner * (v + w), v * w * (tokens + inner))
        return as_matrix < tokens * inner * (2 * v + 3 * w)

    @staticmethod
    def _keeps(tokens: int, v: int, w: int) -> bool:
        return v * w <= tokens * (v + w)

    def plain(self, *tensors: Any) -> Tensor:
        x, weight, bias, B, A, Lambda, Gamma = tensors
        y = F.linear(x, self.matrix(None, B, self.rows(A, Lambda, Gamma)).to(x.dtype))
        return y if weight is None else y + F.linear(x, weight, bias)

    def value_and_kept(self, needs: tuple[bool, ...], *tensors: Any) -> tuple[Tensor, Tensors]:
        x, weight, bias, B, A, Lambda, Gamma = tensors
        R, flat = self.rows(A, Lambda, Gamma), x.reshape(-1, x.shape[-1])  # (Nr, w), (T, n)
        tokens, trained = flat.shape[0], any(needs)
        if self.whole(tokens, B, A, trained=trained):
            matrix = self.matrix(weight, B, R).to(x.dtype)  # (m, n)
            keeps = needs[0] and self._keeps(tokens, B.shape[0], A.shape[1])
            return F.linear(x, matrix, bias), (matrix if keeps else None, None)
        B, R = B.to(x.dtype), R.to(x.dtype)
        z = flat @ (R.t() if self.tall else B)  # (T, Nr)
        right = B.t() if self.tall else R
        y = _scaled_product(None if weight is None else F.linear(flat, weight, bias), z, right, self.scale)  # (T, m)
        return y.reshape(*x.shape[:-1], y.shape[-1]), (None, None if self.tall else z)

    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        x, weight, _, B, A, Lambda, Gamma, matrix, z = tensors
        g, flat = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])  # (T, m), (T, n)
        tokens, (v, inner), w = g.shape[0], B.shape, A.shape[1]
        R = self.rows(A, Lambda, Gamma) if needs[0] and matrix is None else None
        if R is not None and self.whole(tokens, B, A, trained=True):
            matrix, R = self.matrix(weight, B, R).to(g.dtype), None  # (m, n)
        x_gradient = None
        if matrix is not None:
            x_gradient = g @ matrix
        trained = needs[5] or needs[6]
        if R is None and trained and v * w * (tokens + inner) < tokens * inner * (v + w):
            G = (g.t() @ flat).to(B.dtype)  # (m, n)
            return self._all(x_gradient, x, B.t() @ (G if self.tall else G.t()), A, Lambda, Gamma)
        low_B = B.to(g.dtype)
        z = flat @ low_B if z is None and trained and not self.tall else z  # (T, Nr)
        u = g @ low_B if self.tall else g @ R.t().to(g.dtype) if R is not None else None  # (T, Nr)
        if R is not None:
            right = R.to(g.dtype) if self.tall else low_B.t()
            assert u is not None
            x_gradient = _scaled_product(None if weight is None else g @ weight, u, right, self.scale)
        left, right = (u, flat) if self.tall else (z, g)
        return self._all(x_gradient, x, left.t() @ right if trained and left is not None else None, A, Lambda, Gamma)

    def _all(self, x_gradient: Tensor | None, x: Tensor, pulled: Tensor | None, *trained: Tensor) -> Tensors:
        """Gradients of all tensors, those of Lambda and Gamma from that of R over s."""
        dx = None if x_gradient is None else x_gradient.reshape(x.shape)
        if pulled is None:
            return dx, None, None, None, None, None, None
        A, Lambda, Gamma = trained
        r, N = Lambda.shape
        H = pulled.to(A.dtype).mul_(self.scale)
        H = H.view(N, r, -1).mul_(A) if self.paper else H.view(r, N, -1).mul_(A[:, None]).transpose(0, 1)  # (N, r, w)
        of_Lambda = (H @ Gamma[:, :, None]).squeeze(2).t()  # (r, N)
        of_Gamma = (Lambda.t()[:, None, :] @ H).squeeze(1)  # (N, w)
        return dx, None, None, None, None, of_Lambda, of_Gamma


def _scaled_product(sum: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`sum`, overwritten, + scale · left right."""
    return (left @ right).mul_(scale) if sum is None else sum.addmm_(left, right, alpha=scale)


class Bases(Operator):
    """s · B R (m, n) where m >= n, its transpose elsewhere. B (v, Nr), A (r, w), Lambda (r, N), Gamma (N, w)."""

    def __init__(self, B: Tensor, A: Tensor, Lambda: Tensor, Gamma: Tensor, scale: float, *, paper: bool, tall: bool) -> None:
        self.tensors, self.tall = (B, A, Lambda, Gamma), tall
        self.linear, self.scale = _Linear(scale, paper=paper, tall=tall), scale

    @property
    def shape(self) -> tuple[int, int]:
        v, w = self.tensors[0].shape[0], self.tensors[1].shape[1]
        return (v, w) if self.tall else (w, v)

    def pair(self) -> LowRank:
        """The factors (m, Nr) and (Nr, n)."""
        B, R = self.tensors[0], self.linear.rows(*self.tensors[1:])
        return LowRank(B, R, self.scale) if self.tall else LowRank(R.t(), B.t(), self.scale)

    def dense(self) -> Tensor:
        return self.pair().dense()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if isinstance(layout, LinearLayout):
            return self.linear(x.to(compute_dtype(x, x.dtype)), None, None, *self.tensors)
        channels = x.shape[1] if isinstance(layout, ConvLayout) else x.numel()
        positions = x.numel() // max(1, channels)
        return (Dense(self.dense()) if positions > max(self.shape) else self.pair()).apply(x, layout)

    def add_to_base(self, base: Base, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor | None:
        """Both in one product, or by factors, whichever is less work; None where that is not allowed."""
        frozen = frozen_linear(base, x, layout, bias)
        if frozen is None:
            return None
        tokens, trained = math.prod(x.shape[:-1]), torch.is_grad_enabled()
        if self.linear.whole(tokens, *self.tensors[:2], trained=trained) and not sums_in_full(frozen[0]):
            return None  # in half precision the matrix stays apart from W
        return self.linear(*frozen, *self.tensors)
