"""Random blocks that are drawn from a seed whenever they are needed and never kept: Σ_i c_i block_i, and its transpose.

Block i is made of the i-th run of 64-bit words from one CPU generator with this seed. A word is four numbers of 16 bits, v + ½
for v from -2¹⁵ to 2¹⁵ - 1, which times bound / 2¹⁵ are uniform within ±bound: exact in float32, in a quarter of the time that
floats take. A few blocks are drawn at a time, as many as a cache holds. The sum is one opaque node for autograd, torch.compile
and FLOP counters: it saves no tensors, and its backward draws the same blocks again in the same order. The global generators
are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_LEVELS = 2**15  # numbers of 16 bits on each side of zero
_CACHED = 2**18  # numbers that stay in a processor's cache


def words(seed: int, count: int, length: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, v of up to `chunk` blocks (blocks, length)), int16 on the CPU; the chunk size changes no number."""
    generator, per_block = torch.Generator().manual_seed(seed), -(-length // 4)
    chunk = min(chunk, max(1, _CACHED // max(length, 1)))
    for first in range(0, count, chunk):
        drawn = torch.empty(min(chunk, count - first), per_block, dtype=torch.int64)
        drawn.random_(-(2**63), None, generator=generator)
        yield first, drawn.view(torch.int16)[:, :length]


def all_blocks(seed: int, count: int, rows: int, columns: int, bound: float) -> Tensor:
    """Every block at once, (count, rows, columns), in float64."""
    drawn = torch.cat([part for _, part in words(seed, count, rows * columns, count)])  # (count, rows · columns)
    return ((drawn.double() + 0.5) * (bound / _LEVELS)).view(count, rows, columns)


def _like(block: Tensor, other: Tensor) -> Tensor:
    return block.to(device=other.device, dtype=torch.promote_types(other.dtype, torch.float32))


@torch.library.custom_op("rankwise::combine_generated", mutates_args=())
def combine(coefficients: Tensor, seed: int, rows: int, columns: int, bound: float, chunk: int) -> Tensor:
    """Σ_i coefficients[i] block_i, (rows, columns), in the dtype of the coefficients (k,)."""
    wide = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    total = wide.new_zeros(rows * columns)
    for first, drawn in words(seed, wide.shape[0], rows * columns, chunk):
        total += wide[first : first + drawn.shape[0]] @ _like(drawn, wide)
    total = (total + 0.5 * wide.sum()) * (bound / _LEVELS)
    return total.view(rows, columns).to(coefficients.dtype)


@torch.library.custom_op("rankwise::correlate_generated", mutates_args=())
def correlate(matrix: Tensor, count: int, seed: int, bound: float, chunk: int) -> Tensor:
    """⟨block_i, matrix⟩ for every i, (count,): the transpose of `combine`."""
    flat = matrix.flatten().to(torch.promote_types(matrix.dtype, torch.float32))
    found = [_like(drawn, flat) @ flat for _, drawn in words(seed, count, flat.shape[0], chunk)]  # (chunk,) each
    return ((torch.cat(found) + 0.5 * flat.sum()) * (bound / _LEVELS)).to(matrix.dtype)


@combine.register_fake
def _(coefficients: Tensor, seed: int, rows: int, columns: int, bound: float, chunk: int) -> Tensor:
    return coefficients.new_empty(rows, columns)


@correlate.register_fake
def _(matrix: Tensor, count: int, seed: int, bound: float, chunk: int) -> Tensor:
    return matrix.new_empty(count)


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefficients, ctx.seed, _, _, ctx.bound, ctx.chunk = inputs
    ctx.count = coefficients.shape[0]


def _combine_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return correlate(gradient.contiguous(), ctx.count, ctx.seed, ctx.bound, ctx.chunk), None, None, None, None, None


def _keep_correlate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    matrix, _, ctx.seed, ctx.bound, ctx.chunk = inputs
    ctx.rows, ctx.columns = matrix.shape


def _correlate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return combine(gradient.contiguous(), ctx.seed, ctx.rows, ctx.columns, ctx.bound, ctx.chunk), None, None, None, None


combine.register_autograd(_combine_backward, setup_context=_keep_combine)
correlate.register_autograd(_correlate_backward, setup_context=_keep_correlate)


@register_flop_formula(torch.ops.rankwise.combine_generated)
def _combine_flops(coefficients: Any, seed: int, rows: int, columns: int, *_: Any, **__: Any) -> int:
    return 2 * coefficients[0] * rows * columns


@register_flop_formula(torch.ops.rankwise.correlate_generated)
def _correlate_flops(matrix: Any, count: int, *_: Any, **__: Any) -> int:
    return 2 * count * matrix[0] * matrix[1]
