"""Parameterizations around another one: what they hand on to the inner additive method U of W' = f(W, U)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from rankwise.core.bank import Bank
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Additive, Parameterization, Site
from rankwise.core.piece import Piece, piece
from rankwise.parameterizations.lora import LoRA


def inner_piece(inner: Piece | None, rank: int | None, alpha: float | None, scale: str) -> Piece:
    """The inner piece: LoRA where none is named; a rank beside a named one replaces its own."""
    if inner is None:
        return piece(LoRA, rank=8 if rank is None else rank, alpha=alpha, scale=scale)
    if alpha is not None or scale != "lora":
        raise ArgumentError(f"alpha and scale belong to the inner method: write inner={inner.name}(…, alpha=…)")
    return inner if rank is None else Piece(inner.shelf, inner.name, {**inner.arguments, "rank": rank})


def build_inner(chosen: Piece, site: Site) -> Parameterization:
    """The inner method at a site, with an update of zero also where it would begin beside zero on its own."""
    built: Parameterization = chosen.build(site)
    if not built.facts_of(**chosen.arguments).starts_at_base:
        with torch.no_grad():
            built.restart(site)
    return built


class Wrapping(Parameterization):
    """Interface: trains `own_roles` around the child `inner`, chosen by the arguments inner, rank, alpha and scale.

    With `direction=False` there is no inner method, and U = 0.
    """

    own_roles: ClassVar[frozenset[str]]
    inner: Parameterization | None

    @classmethod
    def _inside(cls, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The inner class and its arguments."""
        inner, rank, alpha = (arguments.get(key) for key in ("inner", "rank", "alpha"))
        chosen = inner_piece(inner, rank, alpha, arguments.get("scale", "lora"))
        return chosen.factory, dict(chosen.arguments)

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        method, inside = cls._inside(arguments)
        return cls.own_roles | (method.roles_of(**inside) if arguments.get("direction", True) else frozenset())

    @classmethod
    def start_kinds(cls, **arguments: Any) -> frozenset[str]:
        method, inside = cls._inside(arguments)
        return method.start_kinds(**inside) if arguments.get("direction", True) else frozenset()

    @classmethod
    def gate_starts_open(cls, **arguments: Any) -> bool:
        method, inside = cls._inside(arguments)
        return method.gate_starts_open(**inside)

    @classmethod
    def width_of(cls, m: int, n: int, **arguments: Any) -> int | None:
        method, inside = cls._inside(arguments)
        return method.width_of(m, n, **inside) if arguments.get("direction", True) else None

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        method, inside = cls._inside(arguments)
        return method.shared(sites, **inside)

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        method, inside = cls._inside(arguments)
        if not arguments.get("direction", True):
            return []
        name, kinds, kind = f"{cls.__name__}(inner={method.__name__})", method.facts.layouts, site.layout.kind
        found = list(method.problems_at(site, **inside))
        if not issubclass(method, Additive):
            remedy = "use lora, rslora, vera, lora_xs, flora_core, gated_lora or bone(mode='miss')"
            needs, has = "an additive inner method, W + update", f"{method.__name__} is not additive"
            found.append(Problem(piece=name, needs=needs, has=has, remedy=remedy, sites=(site.name,)))
        if kind not in kinds:
            needs, has = f"a layer of kind {', '.join(sorted(kinds))}", f"this one is of kind {kind}"
            remedy = "leave it out with where=, or take another inner method"
            found.append(Problem(piece=name, needs=needs, has=has, remedy=remedy, sites=(site.name,)))
        return found

    def update(self) -> Operator:
        return super().update() if self.inner is None else self.inner.update()

    def load_factors(self, factors: LowRank) -> None:
        if self.inner is None:
            super().load_factors(factors)
        else:
            self.inner.load_factors(factors)

    def restart(self, site: Site) -> None:
        if self.inner is not None:
            self.inner.restart(site)
