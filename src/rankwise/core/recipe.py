"""A recipe: which pieces, with which arguments. It can be checked against a model, written as JSON and read back.

A `Recipe` names one piece per shelf (steps: a chain). `own` are the fields that the named method itself decides; the others
are defaults that a composition may replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.core.errors import CheckpointError, Problem
from rankwise.core.legality import problems_of
from rankwise.core.parameterization import Parameterization, Site
from rankwise.core.piece import SHELVES, Piece
from rankwise.core.statistics import Statistic
from rankwise.core.step import Step

FORMAT = 1  # version of the JSON form


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines an adaptation but the model and the data.

    Attributes:
        name: the catalog name or the composition as typed.
        parameterization, start, perturbation, schedule, procedure: one piece each.
        step: a chain of pieces.
        own: fields the named method decides itself, for `compose`.
        ranks: site name -> rank, where it differs from the parameterization's.
        overrides: site name -> other arguments of the parameterization that differ there.
    """

    name: str
    parameterization: Piece
    start: Piece | None = None
    step: tuple[Piece, ...] = ()
    perturbation: Piece | None = None
    schedule: Piece | None = None
    procedure: Piece | None = None
    own: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for arguments in self.overrides.values():
            Piece(self.parameterization.shelf, self.parameterization.name, arguments)  # refuses unknown ones

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics to collect before `adapt_`. The weight itself is always there."""
        start = frozenset() if self.start is None else self.start.build().needs
        return (start | self.method.needs_of(**self.parameterization.arguments)) - {Statistic.WEIGHT}

    @property
    def roles(self) -> frozenset[str]:
        """Names of the trained tensors of a site."""
        return self.method.roles_of(**self.parameterization.arguments)

    @property
    def method(self) -> type[Parameterization]:
        """The parameterization's class."""
        return self.parameterization.factory  # type: ignore[return-value]

    def arguments_at(self, site: str) -> dict[str, Any]:
        """The parameterization's arguments at one site, with its own where `overrides` or `ranks` names it."""
        arguments = {**self.parameterization.arguments, **self.overrides.get(site, {})}
        if site in self.ranks:
            arguments["rank"] = self.ranks[site]
        return arguments

    def steps(self) -> list[Step]:
        """The chain of steps, built."""
        return [step.build() for step in self.step]

    def problems(self, sites: Iterable[Site] = (), collected: Iterable[Statistic] | None = None) -> list[Problem]:
        """Every reason why the recipe is illegal, on these sites if given. Empty means legal."""
        return problems_of(self, sites, collected)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping, versioned."""
        data: dict[str, Any] = {"format": FORMAT, "name": self.name, "own": sorted(self.own), "ranks": dict(self.ranks)}
        if self.overrides:
            data["overrides"] = {site: dict(arguments) for site, arguments in self.overrides.items()}
        for shelf in SHELVES:
            value = getattr(self, shelf)
            if shelf == "step":
                data[shelf] = [step.to_json() for step in self.step]
            else:
                data[shelf] = None if value is None else value.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Reads what `to_json` wrote.

        Raises:
            CheckpointError: the format is newer than this library, or not a recipe.
        """
        version = data.get("format")
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(f"this is not a recipe: its format is {version!r}")
        if version > FORMAT:
            raise CheckpointError(
                f"the recipe has format {version}, this rankwise reads up to {FORMAT}; upgrade rankwise to load it"
            )
        pieces = {
            shelf: None if data.get(shelf) is None else Piece.from_json(data[shelf]) for shelf in SHELVES if shelf != "step"
        }
        if pieces["parameterization"] is None:
            raise CheckpointError("the recipe has no parameterization")
        return cls(
            name=str(data["name"]),
            step=tuple(Piece.from_json(step) for step in data.get("step", ())),
            own=frozenset(data.get("own", ())),
            ranks={str(key): int(value) for key, value in dict(data.get("ranks", {})).items()},
            overrides={str(key): dict(value) for key, value in dict(data.get("overrides", {})).items()},
            **pieces,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        parts = [self.parameterization, self.start, *self.step, self.perturbation, self.schedule, self.procedure]
        return " + ".join(str(part) for part in parts if part is not None)
