"""C3A: the update is block-circulant, each b × b block given by one kernel of length b, and applied by Fourier transforms.

    update[i b + p, j b + q] = kernel[i, j, (q - p) mod b] / n          kernel (m/b, n/b, b) trained, starts at zero

So y_i gains (1/n) Σ_j of the circular correlation of kernel_ij with x_j: with F the transform over each block, F(y_i) = Σ_j
F(x_j) ∘ conj(F(kernel_ij)) / n. The division is by all n inputs, which is why learning rates are a hundred times LoRA's; there
is no alpha. b divides m and n. The rank is high for few numbers, so it exports as LoRA only by truncation. Trained numbers
mn / b. Per token about 2.5(m + n) log₂ b + 8(m/b)(n/b)(b/2 + 1) FLOPs; from b = 16 on the transforms are used, below it the
matrix. Transforms are taken in float32 at least. Only x and the kernel are kept for backward, which transforms them again.

*Differs*: starts at zero, where the release draws the kernel and so does not start at the base; every adapter reads the
layer's input (in PEFT a second one reads the first one's output).

Chen et al.: Parameter-Efficient Fine-Tuning via Circular Convolution, 2024, arXiv:2407.19342.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.core.errors import Problem
from rankwise.core.handwritten import Handwritten, Tensors
from rankwise.core.layouts import Layout
from rankwise.core.operators import Operator, compute_dtype
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register

_TRANSFORMS_FROM = 16  # block size


class _Correlate(Handwritten):
    """(x (T, n), kernel) -> (T, m), the block-circulant product without its division by n."""

    def plain(self, *tensors: Any) -> Tensor:
        x, kernel = tensors
        return F.linear(x, circulant(kernel).to(x.dtype))

    def value(self, *tensors: Any) -> Tensor:
        x, kernel = tensors
        b = kernel.shape[2]
        return _joined(_spectrum(x, b) @ _kernel_spectrum(kernel).mH.contiguous(), b, x.dtype)

    def gradients(self, gradient: Tensor, needs: tuple[bool, ...], *tensors: Any) -> Tensors:
        x, kernel = tensors
        b = kernel.shape[2]
        g = _spectrum(gradient, b)  # (frequencies, T, m/b)
        x_gradient = _joined(g @ _kernel_spectrum(kernel), b, x.dtype) if needs[0] else None
        if not needs[1]:
            return x_gradient, None
        product = g.mH @ _spectrum(x, b)  # (frequencies, m/b, n/b)
        return x_gradient, torch.fft.irfft(product.permute(1, 2, 0), n=b).to(kernel.dtype)


def _spectrum(x: Tensor, b: int) -> Tensor:
    """(frequencies, T, n/b): each block of x (T, n) transformed."""
    wide = x if x.dtype is torch.float64 else x.float()
    return (
        torch.fft.rfft(wide.reshape(x.shape[0], x.shape[1] // b, b)).permute(2, 0, 1).contiguous()
    )  # products are faster on these


def _kernel_spectrum(kernel: Tensor) -> Tensor:
    """(frequencies, m/b, n/b)."""
    return torch.fft.rfft(kernel).permute(2, 0, 1).contiguous()


def _joined(spectrum: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """(T, m) from (frequencies, T, m/b)."""
    return torch.fft.irfft(spectrum.permute(1, 2, 0).contiguous(), n=b).flatten(1).to(dtype)


def circulant(kernel: Tensor) -> Tensor:
    """The matrix (m, n) of a kernel (m/b, n/b, b): block row p is the kernel moved p places to the right."""
    rows, columns, b = kernel.shape
    copies = kernel[:, :, None, :].expand(rows, columns, 2 * b - 1, b)  # end to end; a row of 2b - 1 begins b - p places on
    moved = copies.reshape(rows, columns, b, 2 * b - 1)[..., :b]  # (m/b, n/b, b, b)
    return moved.permute(0, 2, 1, 3).reshape(rows * b, columns * b)


class BlockCirculant(Operator):
    """scale times the block-circulant matrix of a kernel (m/b, n/b, b)."""

    def __init__(self, kernel: Tensor, scale: float) -> None:
        self.kernel, self.scale = kernel, scale

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns, b = self.kernel.shape
        return rows * b, columns * b

    def dense(self) -> Tensor:
        return circulant(self.kernel) * self.scale

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.kind != "linear" or self.kernel.shape[2] < _TRANSFORMS_FROM or not x.numel():
            return super().apply(x, layout)
        dtype = compute_dtype(x, self.kernel.dtype)
        y = _Correlate()(x.to(dtype).reshape(-1, x.shape[-1]), self.kernel * self.scale)
        return y.reshape(*x.shape[:-1], self.shape[0])


@register("parameterization")
class C3A(Additive):
    """W' = W + a block-circulant matrix.

    Args:
        site: the layer.
        block: b, the length of a kernel.
    """

    facts = Facts(exact_lora_export=False)

    def __init__(self, site: Site, *, block: int = 256) -> None:
        super().__init__()
        self.n = site.n
        self.kernel = nn.Parameter(site.zeros(site.m // block, site.n // block, block))  # (m/b, n/b, b)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"kernel"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        block, common = arguments.get("block", 256), math.gcd(site.m, site.n)
        if block >= 1 and common % block == 0:
            return []
        fits = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
        return [
            Problem(
                piece="c3a",
                needs=f"a block that divides m and n, one of {fits}",
                has=f"block is {block} for a layer of {site.m} × {site.n}",
                remedy=f"use block={common} or another of these for it, or leave the layer out with where=",
                sites=(site.name,),
            )
        ]

    def update(self) -> Operator:
        return BlockCirculant(self.kernel, 1 / self.n)

    def restart(self, site: Site) -> None:
        self.kernel.zero_()
