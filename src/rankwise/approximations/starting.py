"""What starts share: the two ways to keep the first forward, choosing singular triplets, and what to do with dead ones.

A start is dead where it leaves nothing to train: a direction whose column of B and row of A are both zero has no gradient, now
and ever after. Two causes, each handled in one way. A probe gradient of zero: the layer begins as plain LoRA, and a warning
names it. Singular values of zero among those chosen (a weight of deficient rank): refused, since another choice would be
another method.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rankwise.approximations.truncated_svd import check_rank, plain_start
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import LowRank
from rankwise.core.queries import SVD

MODES = ("offset", "absorb")
SELECTIONS = ("largest", "smallest", "middle", "random")


def check_mode(mode: str) -> str:
    """Refuses modes that do not exist.

    Raises:
        ArgumentError: mode is neither "offset" nor "absorb".
    """
    if mode not in MODES:
        raise ArgumentError(f"mode is {' or '.join(MODES)}, not {mode!r}")
    return mode


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Refuses a value that is not among the allowed ones.

    Raises:
        ArgumentError: it is not.
    """
    if value not in allowed:
        raise ArgumentError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
    return value


def chosen(select: str, count: int, rank: int, generator: torch.Generator) -> Tensor:
    """(r,) indices, ascending, of `count` singular triplets that descend: which of them a start trains."""
    match select:
        case "largest":
            return torch.arange(rank)
        case "smallest":
            return torch.arange(count - rank, count)
        case "middle":
            return torch.arange((count - rank) // 2, (count - rank) // 2 + rank)
    return torch.randperm(count, generator=generator)[:rank].sort().values


def triplets_of(matrix: Tensor, rank: int, what: str) -> SVD:
    """All singular triplets of a matrix (m, n) of which `rank` will be chosen.

    Raises:
        ArgumentError: it does not have so many.
        StatisticsError: it holds NaN or infinity; `what` says what it is.
    """
    check_rank(rank, *matrix.shape)
    if not torch.isfinite(matrix).all():
        raise StatisticsError(f"{what} holds NaN or infinity; look at the weight and the probe data")
    return SVD(*torch.linalg.svd(matrix, full_matrices=False))


def refuse_dead(
    values: Tensor, largest: Tensor, size: int, what: str, *, stored: torch.dtype | None = None, remedy: str = "lower the rank"
) -> None:
    """Refuses a choice of singular values (r,) that holds zeros, up to rounding.

    Two roundings leave something in the place of a zero: the decomposition's own, eps·size·largest, and that of the numbers
    as they are stored, which is eps·largest at most for entries that round independently. Decompose in float64: in float32
    the first of them is 5e-5 of the largest for 384 columns, and real weights have singular values below it.

    Args:
        values: those chosen.
        largest: the largest of all.
        size: the longer side of the matrix.
        what: the layer.
        stored: the precision that the matrix was given in, where it is not that of the values.
        remedy: what helps first.

    Raises:
        StatisticsError: directions would start at zero in both factors and stay there.
    """
    own, given = torch.finfo(values.dtype).eps * size, torch.finfo(stored or values.dtype).eps
    noise = max(own, given) * largest
    dead = int((values <= noise).sum())
    if dead:
        raise StatisticsError(
            f"{what}: {dead} of the {values.numel()} singular values to start from are zero, so both factors would be zero "
            f"there and never train; {remedy}, choose others with select='largest', or leave the layer out of where="
        )


def without_gradient(gradient: Tensor, rank: int, generator: torch.Generator, what: str) -> LowRank | None:
    """LoRA's own start, with a warning, where the probe gradient (m, n) is zero; None where there is one to read."""
    if gradient.any():
        return None
    warnings.warn(
        f"{what}: the probe gradient is zero, so this layer starts as plain LoRA (B = 0, A random); probe with batches that "
        "reach it, or leave it out of where=",
        stacklevel=3,
    )
    return plain_start(gradient, rank, generator)
