"""Moments in 8 bits: codes of a dynamic map, with one scale per block of 256 numbers, as torchao's optimizers keep them.

    x -> scale_b = max |x_b|, code_i = the nearest of 256 values of the map to x_i / scale_b

A moment "name" is kept as two plain tensors, "name_codes" (uint8, the moment's shape) and "name_scale" (float32, one per
block), so that a state is saved and resumed to the bit like any other. 1.016 bytes per number instead of 4. Moments of fewer
than 4096 numbers stay as they are. The map has a sign for first moments and none for squares ("…_sq").

Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, 2021, arXiv:2110.02861.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.sharding import local_part

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # fewer numbers are not worth it, and are often the sensitive ones


def require_torchao() -> Any:
    """The module with torchao's map.

    Raises:
        ArgumentError: torchao is missing.
    """
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise ArgumentError("bits=8 keeps moments in torchao's 8-bit codes: pip install torchao, or use bits=32") from error
    return quant_utils


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    return torch.tensor(require_torchao().create_dynamic_map(signed=signed), dtype=torch.float32, device=device)  # (256,)


@functools.cache
def _edges(signed: bool, device: torch.device) -> Tensor:
    """Half way between neighbors of the map (255,): a search among them finds the nearest code, in one kernel."""
    values = _map(signed, device)
    return (values[1:] + values[:-1]) / 2


def plain_zeros(name: str, like: Tensor) -> dict[str, Tensor]:
    """A moment of zeros, in the dtype of the tensor."""
    return {name: torch.zeros_like(like, memory_format=torch.preserve_format)}


def zeros(name: str, like: Tensor) -> dict[str, Tensor]:
    """A moment of zeros, in codes if it is large enough; of a sharded tensor the part on this device."""
    local = local_part(like)
    if local.numel() < SMALLEST:
        return plain_zeros(name, like)
    codes = torch.zeros(local.shape, dtype=torch.uint8, device=local.device)
    return {
        f"{name}_codes": codes,
        f"{name}_scale": torch.zeros(-(-local.numel() // BLOCK), dtype=torch.float32, device=local.device),
    }


def read(kept: dict[str, Tensor], name: str) -> Tensor | None:
    """The moment as numbers: itself, or decoded; None where there is no such moment."""
    if f"{name}_codes" not in kept:
        return kept.get(name)
    codes, scale = kept[f"{name}_codes"], kept[f"{name}_scale"]
    blocks = _map(not name.endswith("_sq"), codes.device)[_blocks(codes).int()] * scale[:, None]  # (blocks, 256)
    return blocks.reshape(-1)[: codes.numel()].reshape(codes.shape)


def write(kept: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Keeps new numbers of a moment, in the form that it has."""
    if f"{name}_codes" not in kept:
        kept[name].copy_(value)
        return
    blocks = _blocks(value.to(torch.float32))
    scale = blocks.abs().amax(dim=1).clip_(1e-12)  # (blocks,)
    edges = _edges(not name.endswith("_sq"), value.device)
    codes = torch.bucketize(blocks / scale[:, None], edges, right=True, out_int32=True)
    kept[f"{name}_codes"].copy_(codes.reshape(-1)[: value.numel()].reshape(value.shape))
    kept[f"{name}_scale"].copy_(scale)


def _blocks(tensor: Tensor) -> Tensor:
    """(blocks, 256), the last one filled up with zeros."""
    flat = tensor.reshape(-1)
    missing = -flat.numel() % BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).reshape(-1, BLOCK)
