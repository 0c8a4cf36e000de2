"""Sizes as products of a given number of factors, as equal as they can be."""

from __future__ import annotations

import functools


@functools.cache
def even_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of a size in ascending order, those with the smallest sum: 64 -> (4, 4, 4), 768 -> (8, 8, 12).

    A size with fewer prime factors than `count` gets ones.
    """
    if count == 1:
        return (size,)
    most = round(size ** (1 / count) + 1e-9) + 1  # the smallest factor is at most the count-th root
    choices = [
        (first, *even_factors(size // first, count - 1))
        for first in range(1, most + 1)
        if size % first == 0 and first**count <= size
    ]
    return min((tuple(sorted(choice)) for choice in choices), key=lambda choice: (sum(choice), choice))


def has_factors(size: int) -> bool:
    """Whether a size is a product of smaller numbers: not 1 and not prime."""
    return even_factors(size, 2)[0] > 1
