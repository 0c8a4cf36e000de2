"""DoTA: a tensor-train operator cut out of the weight is trained over the frozen rest.

    W' = W + MPO(T) - MPO(T⁰)          T_k (R_{k-1}, m_k, n_k, R_k) trained from T⁰_k, m = m_1 … m_N, n = n_1 … n_N

T⁰ is the truncated matrix product operator of W with bonds R_k up to `rank`, by one SVD per bond; W' = W at the start. Row and
column factors are interleaved, so the bonds bound no matrix rank: R = 1 gives a Kronecker product of N small matrices, usually
of full rank; N = 2 and factors (m, 1), (1, n) give PiSSA. Trained numbers Σ R_{k-1} m_k n_k R_k. Applied core by core, or,
where tokens are many, as a matrix made once per forward. Exports as LoRA only by truncation.

All cores but the last start orthonormal and the last holds the scale of W, so Adam moves them very unevenly; `balanced` gives
every bond √S on both sides instead. Not TT-LoRA or LoTR, whose trains separate rows from columns and are of low rank.

*Differs*: W stays and the start is subtracted (the increment form), where the paper stores W - MPO(T⁰), which bf16 rounds.
Quantizing that residual (QDoTA) is not done; on a quantized base the train is that of the dequantized weight. Rank, factors
and learning rate are not stated where we could read; the defaults are ours. "None" splits a size into three equal factors as
far as it goes, and a size that has no two factors must be given them (11008 = 2⁸ · 43 gives 16 · 16 · 43).

Hu, Cheng, Liu, Liu, Luan, Wang, Liu: DoTA: Weight-Decomposed Tensor Adaptation for Large Language Models, 2024,
arXiv:2412.20891.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.parameterizations.even_factors import even_factors, has_factors
from rankwise.parameterizations.matrix_product import Increment, bonds_of, decompose

Given = Sequence[int] | Sequence[Sequence[int]] | None
COUNT = 3  # factors of a size that none were given for


@register("parameterization")
class DoTA(Additive):
    """W' = W + MPO(T) - MPO(T⁰).

    Args:
        site: the layer.
        rank: R, the largest bond.
        row_factors, column_factors: m_1 … m_N and n_1 … n_N, or several such lists, of which a layer takes the one that
            multiplies to its size; None for as many as the other side has, or three, as equal as possible.
        balanced: √S on both sides of every bond, instead of orthonormal cores and all the scale in the last one.
    """

    facts = Facts(exact_lora_export=False)

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        row_factors: Given = None,
        column_factors: Given = None,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.rank = rank
        rows, columns = _factors(site, row_factors, column_factors)
        bonds = bonds_of(rows, columns, rank)
        shapes = list(zip(bonds[:-1], rows, columns, bonds[1:], strict=True))  # (R_{k-1}, m_k, n_k, R_k)
        if site.blank:
            cores = [site.zeros(*shape) for shape in shapes]
        else:
            cores = decompose(site.weight().double(), rows, columns, rank, balanced=balanced)
        self.count = len(cores)
        for k, core in enumerate(cores, start=1):
            self.register_parameter(f"core_{k}", nn.Parameter(site.cast(core)))
            self.register_buffer(f"start_{k}", site.cast(core))

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        given = arguments.get("row_factors") or arguments.get("column_factors")
        return frozenset(f"core_{k}" for k in range(1, _count(given) + 1))

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        return None  # a bond may be wider than the matrix

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        if arguments.get("rank", 8) < 1:
            raise ArgumentError(f"rank is the largest bond, at least 1, not {arguments['rank']}")
        found, given = [], (arguments.get("row_factors"), arguments.get("column_factors"))
        rows, columns = _factors(site, *given)
        for side, size, factors in (("row_factors", site.m, rows), ("column_factors", site.n, columns)):
            if math.prod(factors) != size or min(factors) < 1:
                found.append((f"{side} that multiply to {size}", f"{factors} multiply to {math.prod(factors)}", side, size))
        if len(rows) != len(columns):
            found.append(("as many row as column factors", f"{len(rows)} and {len(columns)}", "row_factors", site.m))
        for side, size, own in (("row_factors", site.m, given[0]), ("column_factors", site.n, given[1])):
            if own is None and size > 3 and not has_factors(size):
                found.append((f"a size that has factors, or {side}= given", f"{size} has none but itself and 1", side, size))
        return [
            Problem(
                piece="dota",
                needs=needs,
                has=has,
                remedy=f"use {side}={even_factors(size, max(len(rows), len(columns)))}, or leave the layer out with where=",
                sites=(site.name,),
            )
            for needs, has, side, size in found
        ]

    def update(self) -> Operator:
        def all_of(name: str) -> list[Tensor]:
            return [getattr(self, f"{name}_{k}") for k in range(1, self.count + 1)]

        return Increment(all_of("core"), all_of("start"))


def _factors(site: Site, rows: Given, columns: Given) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """m_1 … m_N and n_1 … n_N: as given, or as many as the other side has."""
    count = _count(rows or columns)
    return _of_size(rows, site.m) or even_factors(site.m, count), _of_size(columns, site.n) or even_factors(site.n, count)


def _lists(given: Given) -> list[tuple[int, ...]]:
    """One list or several, as several."""
    if given is None:
        return []
    several = [item for item in given if not isinstance(item, int)]
    return [tuple(item) for item in several] if several else [cast("tuple[int, ...]", tuple(given))]


def _count(given: Given) -> int:
    lists = _lists(given)
    return len(lists[0]) if lists else COUNT


def _of_size(given: Given, size: int) -> tuple[int, ...] | None:
    """The list that multiplies to a size; the first where none does, for the message."""
    lists = _lists(given)
    return next((item for item in lists if math.prod(item) == size), lists[0] if lists else None)
