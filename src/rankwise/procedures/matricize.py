"""A convolution's weight as a matrix, three ways: which pair of small convolutions a low-rank matrix can be.

    kernel (out, in, k₁, k₂…), in = inputs of one group
    channel    (out) × (in·k₁·k₂…)                 a convolution into r channels, then a pointwise one
    spatial    (in·k₁) × (out·k₂…)                 a convolution along k₁, then one along the rest
    filter     for every output (in) × (k₁·k₂…)    r pointwise maps per output, then a convolution of its own channels

A linear weight (out, in) counts as a kernel of one entry: channel gives it, spatial its transpose, filter columns (in) × 1.
Unfolding and folding move entries and nothing else, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError

KINDS = ("channel", "spatial", "filter")


def check_kind(kind: str) -> str:
    """Refuses matricizations that do not exist.

    Raises:
        ArgumentError: it is none of `KINDS`.
    """
    if kind not in KINDS:
        raise ArgumentError(f"matricization is one of {', '.join(KINDS)}, not {kind!r}")
    return kind


def unfold(kernel: Tensor, kind: str) -> Tensor:
    """The matrix of a kernel (out, in, k₁, k₂…): two modes for channel and spatial, a batch (out, in, k₁·k₂…) for filter."""
    m, channels = kernel.shape[:2]
    if check_kind(kind) == "channel":
        return kernel.reshape(m, -1)
    if kind == "filter":
        return kernel.reshape(m, channels, -1)
    first = kernel.shape[2] if kernel.dim() > 2 else 1
    return kernel.reshape(m, channels, first, -1).permute(1, 2, 0, 3).reshape(channels * first, -1)


def fold(matrix: Tensor, kind: str, shape: Sequence[int]) -> Tensor:
    """The kernel of the given shape (out, in, k₁, k₂…) of what `unfold` gave."""
    if check_kind(kind) != "spatial":
        return matrix.reshape(tuple(shape))
    m, channels, *kernel = shape
    first = kernel[0] if kernel else 1
    return matrix.reshape(channels, first, m, -1).permute(2, 0, 1, 3).reshape(tuple(shape))


def has_kernel(shape: Sequence[int]) -> bool:
    """Whether a weight (out, in, kernel…) has more than one entry per pair of channels; else every layer is a matrix."""
    return torch.Size(shape[2:]).numel() > 1
