"""A matrix that is a sum of plane waves, scale / (mn) · Σ_k c_k cos(2π(p_k o / m + q_k i / n)), applied without being made.

Token by token, with X(q) = Σ_i x_i exp(2πi q i / n): y is the real part of Σ_k c_k X(q_k) exp(2πi p_k o / m). So x is
transformed along its inputs, n_f numbers are picked, weighted and put at p_k, and transformed back along the outputs. Half
spectra suffice: (p, q) and (m - p, n - q) are the same wave, and X(n - q) is the conjugate of X(q).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.handwritten import Handwritten, Tensors
from rankwise.core.layouts import Layout, LinearLayout
from rankwise.core.operators import LowRank, Operator, compute_dtype
from rankwise.core.queries import narrow_form
from rankwise.core.sparse_linear import product_at

_TRANSFORM = 15.0  # FLOPs of a matrix product that take as long as a transform of length l, over l log₂ l; there and back

Once = Callable[[Hashable, Callable[[], Any]], Any]


def _matrix(coefficients: Tensor, positions: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """The matrix (m, n), in float32 at least."""
    wide = coefficients if coefficients.dtype is torch.float64 else coefficients.float()
    spectrum = wide.new_zeros(size).index_put((positions[0], positions[1]), wide, accumulate=True)  # (m, n)
    return torch.fft.ifft2(spectrum).real * scale


def halves(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """(2, 4, n_f): the waves by half frequencies, forward and, with inputs and outputs exchanged, backward.

    Ordered rows p' <= m/2, columns q' <= n/2, the signs of X's imaginary parts, and that order.
    """
    return torch.stack([_half(positions, size), _half(positions.flip(0), size[::-1])])


def _half(positions: Tensor, size: tuple[int, ...]) -> Tensor:
    (p, q), (m, n) = positions, size
    q = torch.where(2 * p > m, (n - q) % n, q)
    p = torch.where(2 * p > m, m - p, p)
    sign = torch.where(2 * q > n, 1, -1)
    q = torch.where(2 * q > n, n - q, q)
    order = torch.argsort(p * n + q)
    return torch.stack([p[order], q[order], sign[order], order])


def _transformed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts (T, frequencies) of the transform of x (T, n), stored with tokens side by side."""
    spectrum = torch.fft.rfft(x)
    return spectrum.real.t().contiguous().t(), spectrum.imag.t().contiguous().t()


class _Waved(Handwritten):
    """(x (T, n), c, positions) -> y (T, m) in x's dtype, float32 or float64."""

    def __init__(self, size: tuple[int, int], scale: float, known: Tensor, once: Once | None) -> None:
        self.size, self.scale, self.known, self.once = size, scale, known, once

    def plain(self, *tensors: Any) -> Tensor:
        x, coefficients, positions = tensors
        return F.linear(x, _matrix(coefficients, positions, self.size, self.scale).to(x.dtype))

    def value_and_kept(self, needs: tuple[bool, ...], *tensors: Any) -> tuple[Tensor, Tensors]:
        x, coefficients, _ = tensors
        spectrum = self._spectrum(x)
        y = self._through(spectrum, coefficients, self.known[0], self.size)
        return y, (spectrum if needs[1] else (None, None))

    def _spectrum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transform of x, made and kept once for layers that read the same x; x is held with it."""
        if self.once is None or x.is_inference():
            return _transformed(x)
        key = ("waves", x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.device)
        return self.once(key, lambda: (x.detach(), _transformed(x)))[1]

    def _through(self, spectrum: tuple[Tensor, Tensor], c: Tensor, half: Tensor, size: tuple[int, ...]) -> Tensor:
        (m, n), (rows, columns, sign, order) = size, half
        starts = torch.searchsorted(rows, torch.arange(m // 2 + 1, device=rows.device))
        edge = (rows == 0) | (2 * rows == m)  # frequencies that are their own mirror image
        weight = c[order].to(spectrum[0].dtype) * torch.where(edge, 1.0, 0.5).to(spectrum[0].dtype) * (self.scale / n)
        real, imaginary = (
            F.embedding_bag(columns, part.t(), starts, mode="sum", per_sample_weights=w)
            for part, w in zip(spectrum, (weight, weight * sign), strict=True)
        )
        joined = real.new_empty(real.shape[1], real.shape[0], 2)  # (T, frequencies, 2)
        joined[..., 0], joined[..., 1] = real.t(), imaginary.t()
        return torch.fft.irfft(torch.view_as_complex(joined), n=m)

    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        _, coefficients, _, *spectrum = tensors
        (m, n), g = self.size, _transformed(gradient)
        x_gradient = self._through(g, coefficients, self.known[1], (n, m)) if needs[0] else None
        if not needs[1]:
            return x_gradient, None, None
        rows, columns, sign, order = self.known[0]
        flat = rows * (n // 2 + 1) + columns
        total = product_at(g[0], spectrum[0], flat) + sign * product_at(g[1], spectrum[1], flat)
        return x_gradient, torch.empty_like(total).index_copy(0, order, total * (self.scale / (m * n))), None


class Waves(Operator):
    """A sum of plane waves with amplitudes (n_f,) at integer positions (2, n_f); `known` is their `halves`, where kept.

    `once` shares a tensor between the layers of one forward (see `Site`).
    """

    def __init__(
        self,
        coefficients: Tensor,
        positions: Tensor,
        size: tuple[int, int],
        scale: float,
        known: Tensor | None = None,
        once: Once | None = None,
    ) -> None:
        self.coefficients, self.positions, self.size, self.scale = coefficients, positions, size, scale
        self.known, self.once = known, once

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def dense(self) -> Tensor:
        return _matrix(self.coefficients, self.positions, self.size, self.scale)

    def factors(self) -> LowRank:
        """The exact pair of rank 2 n_f: cos u cos v - sin u sin v; the matrix itself where that is narrower."""
        (m, n), count = self.size, self.coefficients.shape[0]
        if 2 * count >= min(m, n):
            matrix = self.dense()
            identity = torch.eye(min(m, n), dtype=matrix.dtype, device=matrix.device)
            return LowRank(matrix, identity) if n <= m else LowRank(identity, matrix)
        (p, q), c = self.positions, self.coefficients
        outputs, inputs = torch.arange(m, device=p.device), torch.arange(n, device=p.device)
        u = (outputs[:, None] * p % m).double() * (2 * math.pi / m)  # (m, n_f), in one turn
        v = (q[:, None] * inputs % n).double() * (2 * math.pi / n)  # (n_f, n)
        B = torch.cat([u.cos(), -u.sin()], dim=1).to(c.dtype) * torch.cat([c, c])
        return LowRank(B, torch.cat([v.cos(), v.sin()]).to(c.dtype), self.scale / (m * n))

    @property
    def _prefers_factors(self) -> bool:
        (m, n), count = self.size, self.coefficients.shape[0]
        return 4 * count * (m + n) < _TRANSFORM * (m * math.log2(m) + n * math.log2(n)) and 2 * count < min(m, n)

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if self._prefers_factors:
            return self.factors().apply(x, layout)
        if not isinstance(layout, LinearLayout):
            return super().apply(x, layout)
        dtype = compute_dtype(x, self.coefficients.dtype)
        wide = x.reshape(-1, x.shape[-1]).to(torch.promote_types(dtype, torch.float32))  # there is no transform of bfloat16
        if not wide.shape[0]:
            return super().apply(x, layout)
        known = halves(self.positions, self.size) if self.known is None else self.known
        y = _Waved(self.size, self.scale, known, self.once)(wide, self.coefficients, self.positions)
        return y.reshape(*x.shape[:-1], self.size[0]).to(dtype)


@narrow_form(Waves)
def _(operator: Waves) -> LowRank | None:
    return operator.factors()
