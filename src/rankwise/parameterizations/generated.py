"""Random blocks that are drawn from a seed whenever they are needed and never kept: Σ_i c_i block_i, and its transpose.

Block i is the i-th run of rows × columns numbers U(±bound), in float32, from one CPU generator with this seed; a few blocks are
drawn at a time. The sum is one opaque node for autograd, torch.compile and FLOP counters: it saves no tensors, and its
backward draws the same blocks again in the same order. The global generators are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def blocks(seed: int, count: int, size: tuple[int, int], bound: float, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, blocks (up to chunk, rows, columns)), float32 on the CPU; the chunk size changes no number."""
    rows, columns = size
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, count, chunk):
        some = (min(chunk, count - first), rows, columns)
        yield first, torch.rand(some, generator=generator, dtype=torch.float32).mul_(2).sub_(1).mul_(bound)


def all_blocks(seed: int, count: int, rows: int, columns: int, bound: float) -> Tensor:
    """Every block at once, (count, rows, columns)."""
    return next(blocks(seed, count, (rows, columns), bound, count))[1]


def _like(block: Tensor, other: Tensor) -> Tensor:
    return block.to(device=other.device, dtype=torch.promote_types(other.dtype, torch.float32))


@torch.library.custom_op("rankwise::combine_generated", mutates_args=())
def combine(coefficients: Tensor, seed: int, rows: int, columns: int, bound: float, chunk: int) -> Tensor:
    """Σ_i coefficients[i] block_i, (rows, columns), in the dtype of the coefficients (k,)."""
    total = torch.zeros(rows, columns, dtype=torch.promote_types(coefficients.dtype, torch.float32), device=coefficients.device)
    for first, drawn in blocks(seed, coefficients.shape[0], (rows, columns), bound, chunk):
        drawn = _like(drawn, coefficients)
        part = coefficients[first : first + drawn.shape[0]].to(drawn.dtype)  # (chunk,)
        total += (part @ drawn.flatten(1)).reshape(rows, columns)
    return total.to(coefficients.dtype)


@torch.library.custom_op("rankwise::correlate_generated", mutates_args=())
def correlate(matrix: Tensor, count: int, seed: int, bound: float, chunk: int) -> Tensor:
    """⟨block_i, matrix⟩ for every i, (count,): the transpose of `combine`."""
    found = []
    for _, drawn in blocks(seed, count, (matrix.shape[0], matrix.shape[1]), bound, chunk):
        drawn = _like(drawn, matrix)
        found.append(drawn.flatten(1) @ matrix.flatten().to(drawn.dtype))  # (chunk,)
    return torch.cat(found).to(matrix.dtype)


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
