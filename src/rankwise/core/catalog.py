"""How published names are kept: an entry per name with shelf, formula, facts and reference, filled by a decorator.

The entries themselves stand in `rankwise.catalog`. Docs page, `rankwise methods`, contract run and benchmark rows are all
generated from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rankwise.core.errors import ArgumentError, did_you_mean

SHELVES = (
    "parameterization",
    "start",
    "step",
    "perturbation",
    "schedule",
    "procedure",
    "network",
    "merging",
    "compression",
    "certificate",
    "serving",
    "problem",
)


@dataclass(frozen=True)
class Reference:
    """Where a method was published."""

    authors: str
    title: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        return f"{self.authors}: {self.title}, {self.year}" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published name.

    Attributes:
        slug: its name in the catalog.
        shelf: one of `SHELVES`.
        make: for what can be adapted or trained with, arguments -> Recipe; for the other shelves the ready callable.
        title, summary: its usual name, and one sentence on what it does.
        formula: one line in the letters of the library.
        trained: trained numbers per layer, as a formula.
        numbers: the same as a Python expression in m, n and the arguments, for one adapted linear layer (shared tensors
            included); the contract counts them.
        flops: of a parameterization, extra FLOPs in matrix products of the forward, as a Python expression in m, n, T (tokens)
            and the arguments; the contract counts them.
        cost: extra cost, as a formula or a sentence.
        state: of a step, numbers kept per layer beside counters, as a Python expression in m, n, r and `numbers`, the trained
            ones; the contract counts them.
        merges: "exact", or how the weight is changed.
        exports: "exact at rank r", or why not.
        when: one honest sentence on when to use it.
        tiny: arguments for the contract tests on layers of size <= 16.
        variants: texts of further recipes of this entry that the contract runs on, with tiny sizes.
    """

    slug: str
    shelf: str
    make: Callable[..., Any]
    title: str
    summary: str
    formula: str
    reference: Reference
    trained: str = ""
    numbers: str = ""
    flops: str = ""
    cost: str = ""
    state: str = ""
    merges: str = ""
    exports: str = ""
    when: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ()

    @property
    def small(self) -> str:
        """The recipe's text with the tiny arguments, as `compose` reads it."""
        inside = ", ".join(f"{key}={value!r}" for key, value in self.tiny.items())
        return f"{self.slug}({inside})" if inside else self.slug


_entries: dict[str, Entry] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def entry(shelf: str, *, title: str, formula: str, reference: Reference, **facts: Any) -> Callable[[Function], Function]:
    """Puts a function or class into the catalog under its own name; its docstring's first line becomes the summary.

    Args:
        shelf: one of `SHELVES`.
        title, formula, reference: see `Entry`.
        **facts: the other fields of `Entry`; `slug` where it differs from the function's name.
    """

    def keep(function: Function) -> Function:
        slug = facts.pop("slug", function.__name__)
        if shelf not in SHELVES or slug in _entries:
            raise TypeError(f"catalog entry {slug!r} on shelf {shelf!r} is a duplicate or misplaced; this is a bug in rankwise")
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _entries[slug] = Entry(
            slug=slug, shelf=shelf, make=function, title=title, summary=summary, formula=formula, reference=reference, **facts
        )
        return function

    return keep


def names(shelf: str | None = None) -> list[str]:
    """Every slug, or those of one shelf.

    Raises:
        ArgumentError: no such shelf.
    """
    if shelf is not None and shelf not in SHELVES:
        raise ArgumentError(f"no shelf {shelf!r}. {did_you_mean(shelf, SHELVES)}")
    return [slug for slug, kept in _entries.items() if shelf in (None, kept.shelf)]


def get(slug: str) -> Entry:
    """The entry of a slug.

    Raises:
        ArgumentError: no such method; names the nearest.
    """
    if slug not in _entries:
        raise ArgumentError(f"no method {slug!r} in the catalog. {did_you_mean(slug, _entries)}")
    return _entries[slug]
