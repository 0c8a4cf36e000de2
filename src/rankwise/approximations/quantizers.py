"""Quantizers in plain torch, the reference for LoftQ and for real 4-bit layers: blocks of numbers with one scale each.

    value = offset_block + scale_block · level[code]

`NormalFloat` (NF4, NF2, …): 2^b levels at quantiles of the normal distribution, scaled so that the largest is 1 and 0 is one of
them; offset 0 and scale the largest magnitude of the block. One level more on the positive side than on the negative one.
`Uniform`: evenly spaced levels from the smallest to the largest number of the block. Blocks run over the tensor as it lies in
memory, row by row; the last one may be short. A block of zeros gives zeros. Scales stay in the tensor's own precision (at least
float32): bitsandbytes' double quantization of scales is not imitated, which moves values by another 0.4 % of the scale.

Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.core.errors import ArgumentError

OUTERMOST = 0.9677083  # the quantile of the level 1 in the published table of NF4


@dataclass(frozen=True)
class Quantized:
    """A tensor in codes.

    Attributes:
        codes: (blocks, block), uint8; the last block is filled up.
        levels: (2^b,) what a code stands for.
        scale, offset: (blocks, 1).
        shape, dtype: of the tensor it stands for.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    offset: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for."""
        values = self.offset + self.scale * self.levels[self.codes.long()]  # (blocks, block)
        return values.flatten()[: self.shape.numel()].reshape(self.shape).to(self.dtype)


class NormalFloat:
    """Levels at quantiles of the normal distribution.

    Args:
        bits: b; 4 is NF4, 2 is NF2.
        block: numbers that share a scale.
    """

    def __init__(self, bits: int = 4, block: int = 64) -> None:
        _check(bits, block)
        self.bits, self.block = bits, block

    def levels(self) -> Tensor:
        """(2^b,) ascending from -1 to 1, in float64."""
        half = 2 ** (self.bits - 1)
        positive = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, half + 1, dtype=torch.float64)[:-1])  # (half,)
        negative = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, half, dtype=torch.float64)[:-1])  # (half - 1,)
        return torch.cat([negative, positive.new_zeros(1), positive.flip(0)]) / positive[0]

    def quantize(self, tensor: Tensor) -> Quantized:
        """Every number to the nearest level of its block."""
        blocks = _blocks(tensor, self.block)
        scale = blocks.abs().amax(1, keepdim=True)  # (blocks, 1)
        levels = self.levels().to(blocks)
        relative = blocks / torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
        return Quantized(codes.to(torch.uint8), levels, scale, torch.zeros_like(scale), tensor.shape, tensor.dtype)


class Uniform:
    """Evenly spaced levels between the extremes of a block.

    Args:
        bits: b.
        block: numbers that share a scale.
    """

    def __init__(self, bits: int = 4, block: int = 64) -> None:
        _check(bits, block)
        self.bits, self.block = bits, block

    def quantize(self, tensor: Tensor) -> Quantized:
        """Every number to the nearest level of its block."""
        blocks = _blocks(tensor, self.block)
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)  # (blocks, 1)
        top = 2**self.bits - 1
        step = (high - low) / top
        codes = ((blocks - low) / torch.where(step > 0, step, torch.ones_like(step))).round().clamp(0, top)
        levels = torch.arange(top + 1, device=blocks.device).to(blocks)  # (2^b,)
        return Quantized(codes.to(torch.uint8), levels, step, low, tensor.shape, tensor.dtype)


def _blocks(tensor: Tensor, block: int) -> Tensor:
    """(blocks, block) in at least float32; a short last block is filled with its last number, which changes no extreme."""
    flat = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).flatten()
    missing = -flat.numel() % block
    return F.pad(flat[None], (0, missing), mode="replicate")[0].reshape(-1, block) if missing else flat.reshape(-1, block)


def _check(bits: int, block: int) -> None:
    if not 2 <= bits <= 8 or block < 1:
        raise ArgumentError(f"bits is 2 to 8 and block 1 or more, not {bits} and {block}")
