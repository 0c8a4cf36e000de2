"""How a catalog function makes its recipe: which fields the published method decides, and which it leaves to a composition."""

from __future__ import annotations

from rankwise.core.piece import Piece, piece
from rankwise.core.recipe import Recipe
from rankwise.steps.moments import adamw

OWN = frozenset({"parameterization"})


def adapter(parameterization: Piece, *, name: str) -> Recipe:
    """A recipe that decides the parameterization and leaves the rest at its defaults (AdamW, no start)."""
    return Recipe(name=name, parameterization=parameterization, step=(piece(adamw),), own=OWN)


def starting(start: Piece, parameterization: Recipe, *, name: str) -> Recipe:
    """A recipe that decides the start; the parameterization is a default that a composition may replace."""
    return Recipe(
        name=name,
        parameterization=parameterization.parameterization,
        start=start,
        step=(piece(adamw),),
        own=frozenset({"start"}),
    )
