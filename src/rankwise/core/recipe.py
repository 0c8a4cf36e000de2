"""A recipe: which pieces, with which arguments. It can be checked against a model, written as JSON and read back.

A `Piece` is a registered factory with its arguments. A `Recipe` names one piece per shelf (steps: a chain). `own` are the
fields that the named method itself decides; the others are defaults that a composition may replace.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rankwise.core.errors import ArgumentError, CheckpointError, Problem, did_you_mean
from rankwise.core.parameterization import INPUT, PRODUCT, Parameterization, Site
from rankwise.core.statistics import Statistic
from rankwise.core.step import MOMENTS, Step

FORMAT = 1  # version of the JSON form
SHELVES = ("parameterization", "start", "step", "perturbation", "schedule", "procedure")
_registry: dict[str, dict[str, Callable[..., Any]]] = {shelf: {} for shelf in SHELVES}

Factory = TypeVar("Factory", bound=Callable[..., Any])


def register(shelf: str) -> Callable[[Factory], Factory]:
    """Makes a class or function known under its own name, so that recipes with it can be written and read."""

    def keep(factory: Factory) -> Factory:
        name = factory.__name__
        if name in _registry[shelf]:
            raise TypeError(f"{shelf} {name!r} is registered twice; this is a bug in rankwise")
        _registry[shelf][name] = factory
        return factory

    return keep


@dataclass(frozen=True)
class Piece:
    """A registered factory and its arguments.

    Raises:
        ArgumentError: the factory or one of the arguments is unknown.
    """

    shelf: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _registry[self.shelf]
        if self.name not in known:
            raise ArgumentError(f"unknown {self.shelf} {self.name!r}. {did_you_mean(self.name, known)}")
        accepted = [
            parameter.name
            for parameter in inspect.signature(self.factory).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        for argument in self.arguments:
            if argument not in accepted:
                raise ArgumentError(f"{self.name} has no argument {argument!r}. {did_you_mean(argument, accepted)}")

    @property
    def factory(self) -> Callable[..., Any]:
        """The class or function."""
        return _registry[self.shelf][self.name]

    def build(self, *positional: Any) -> Any:
        """Calls the factory."""
        return self.factory(*positional, **self.arguments)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        arguments = {key: _argument_to_json(value) for key, value in self.arguments.items()}
        return {"shelf": self.shelf, "name": self.name, "arguments": arguments}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Piece:
        """Reads what `to_json` wrote."""
        if data.get("shelf") not in _registry:
            raise CheckpointError(f"a recipe names the shelf {data.get('shelf')!r}; known: {', '.join(SHELVES)}")
        arguments = {key: _argument_from_json(value) for key, value in dict(data.get("arguments", {})).items()}
        return cls(data["shelf"], str(data["name"]), arguments)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.arguments.items() if value is not None)
        return f"{self.name}({inside})"


def piece(factory: Callable[..., Any], **arguments: Any) -> Piece:
    """A piece from its factory: `piece(LoRA, rank=8)`."""
    for shelf, known in _registry.items():
        if known.get(factory.__name__) is factory:
            return Piece(shelf, factory.__name__, arguments)
    raise TypeError(f"{factory!r} is on no shelf; decorate it with @register(shelf)")


def _argument_to_json(value: Any) -> Any:
    if isinstance(value, Piece):
        return {"piece": value.to_json()}
    if isinstance(value, tuple | list):
        return [_argument_to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str | dict):
        return value
    raise ArgumentError(f"{value!r} cannot be written into a recipe; use numbers, texts, lists or pieces")


def _argument_from_json(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"piece"}:
        return Piece.from_json(value["piece"])
    return tuple(_argument_from_json(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines an adaptation but the model and the data.

    Attributes:
        name: the catalog name or the composition as typed.
        parameterization, start, perturbation, schedule, procedure: one piece each.
        step: a chain of pieces.
        own: fields the named method decides itself, for `compose`.
        ranks: site name -> rank, where it differs from the parameterization's.
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

    @property
    def needs(self) -> frozenset[Statistic]:
        """Statistics to collect before `adapt_`. The weight itself is always there."""
        return frozenset() if self.start is None else self.start.build().needs - {Statistic.WEIGHT}

    @property
    def roles(self) -> frozenset[str]:
        """Names of the trained tensors of a site."""
        return self._parameterization_class.roles_of(**self.parameterization.arguments)

    @property
    def _parameterization_class(self) -> type[Parameterization]:
        return self.parameterization.factory  # type: ignore[return-value]

    def arguments_at(self, site: str) -> dict[str, Any]:
        """The parameterization's arguments at one site, with its own rank where `ranks` names it."""
        arguments = dict(self.parameterization.arguments)
        if site in self.ranks:
            arguments["rank"] = self.ranks[site]
        return arguments

    def steps(self) -> list[Step]:
        """The chain of steps, built."""
        return [step.build() for step in self.step]

    def problems(self, sites: Iterable[Site] = (), collected: Iterable[Statistic] | None = None) -> list[Problem]:
        """Every reason why the recipe is illegal, on these sites if given. Empty means legal."""
        sites = list(sites)
        return [
            *self._role_problems(),
            *self._gate_problems(),
            *self._restart_problems(),
            *self._start_problems(collected),
            *self._site_problems(sites),
        ]

    def _gate_problems(self) -> list[Problem]:
        method, arguments = self._parameterization_class, self.parameterization.arguments
        if self.schedule is None or not self.schedule.factory.shrinks_gates or "gate" not in self.roles:  # type: ignore[attr-defined]
            return []
        if method.gate_starts_open(**arguments):
            return []
        return [
            Problem(
                piece=f"schedule {self.schedule.name}",
                needs="gates that start away from zero, since it pulls them there",
                has=f"those of {self.parameterization} start at zero and would never leave",
                remedy="use gated_lora(form='sora')",
            )
        ]

    def _restart_problems(self) -> list[Problem]:
        method = self._parameterization_class
        if self.procedure is None or not self.procedure.factory.restarts:  # type: ignore[attr-defined]
            return []
        if method.restarts(**self.parameterization.arguments):
            return []
        return [
            Problem(
                piece=f"procedure {self.procedure.name}",
                needs="a parameterization that can be absorbed into the weight and begin again at zero",
                has=f"{self.parameterization.name} cannot",
                remedy="use an additive parameterization of low rank (lora, rslora, lora_fa), or drop it",
            )
        ]

    def _role_problems(self) -> list[Problem]:
        method, roles = self.parameterization.name, self.roles
        trains = f"{method} trains {', '.join(sorted(roles))}"
        found = []
        for shelf in ("step", "perturbation", "schedule", "procedure"):
            pieces = self.step if shelf == "step" else (getattr(self, shelf),)
            for part in pieces:
                if part is None:
                    continue
                needed = part.build().roles if shelf == "step" else part.factory.roles  # type: ignore[attr-defined]
                if not needed <= roles:
                    found.append(
                        Problem(
                            piece=f"{shelf} {part.name}",
                            needs=f"roles {', '.join(sorted(needed))}",
                            has=trains,
                            remedy=_role_remedy(needed, part.name),
                        )
                    )
        steps = self.steps()
        moments = [step.name for step in steps if step.stage == MOMENTS]
        if len(moments) != 1:
            found.append(
                Problem(
                    piece="the chain of steps",
                    needs="exactly one step that makes the update (adamw, sgd, galore)",
                    has=f"this one has {', '.join(moments) or 'none'}",
                    remedy="name one of them",
                )
            )
        preconditioners = [step.name for step in steps if step.preconditions]
        if len(preconditioners) > 1:
            found.append(
                Problem(
                    piece="the chain of steps",
                    needs="at most one preconditioner",
                    has=f"{' and '.join(preconditioners)} would both precondition the same gradient",
                    remedy=f"keep {' or '.join(preconditioners)}",
                )
            )
        return found

    def _start_problems(self, collected: Iterable[Statistic] | None) -> list[Problem]:
        if self.start is None:
            return []
        found, start, method = [], self.start.build(), self.parameterization.name
        kinds = self._parameterization_class.start_kinds(**self.parameterization.arguments)
        what = {PRODUCT: "a product B A", INPUT: "an input factor A"}[start.kind]
        if start.kind not in kinds:
            found.append(
                Problem(
                    piece=f"start {self.start.name}",
                    needs=f"a parameterization that can hold {what}",
                    has=f"{method} {'has a start of its own' if not kinds else 'holds only ' + ', '.join(sorted(kinds))}",
                    remedy="use lora, rslora or dora (lora_xs for a product), or drop this start",
                )
            )
        prunes = self.schedule is not None and self.schedule.factory.prunes  # type: ignore[attr-defined]
        if start.kind == PRODUCT and prunes and self.schedule is not None:
            found.append(
                Problem(
                    piece=f"schedule {self.schedule.name}",
                    needs="directions that can be pruned without loss",
                    has=f"start {self.start.name} puts a part of the weight into every direction, which pruning throws away",
                    remedy="use a start with B = 0 (eva, nystrom_nora), or drop one of the two",
                )
            )
        missing = sorted(item.value for item in self.needs - frozenset(collected or ())) if collected is not None else []
        if missing:
            found.append(
                Problem(
                    piece=f"start {self.start.name}",
                    needs=f"statistics {', '.join(missing)}",
                    has="they were not collected",
                    remedy="pass statistics=rankwise.collect(model, probe_batches, recipe.needs)",
                )
            )
        return found

    def _site_problems(self, sites: list[Site]) -> list[Problem]:
        method, found = self._parameterization_class, []
        unfit = [site.name for site in sites if site.layout.kind not in method.facts.layouts]
        if unfit:
            kinds = ", ".join(sorted(method.facts.layouts))
            found.append(
                Problem(
                    piece=self.parameterization.name,
                    needs=f"a layer of kind {kinds}",
                    has="these layers are of another kind",
                    remedy="leave them out with where=",
                    sites=tuple(unfit),
                )
            )
        for site in sites:
            width = method.width_of(site.m, site.n, **self.arguments_at(site.name))
            if width is not None and not 1 <= width <= min(site.m, site.n):
                found.append(
                    Problem(
                        piece=self.parameterization.name,
                        needs=f"1 <= rank <= min(m, n) = {min(site.m, site.n)}",
                        has=f"rank is {width} for a layer of {site.m} × {site.n}",
                        remedy=f"use rank={min(site.m, site.n)} or less, or leave the layer out with where=",
                        sites=(site.name,),
                    )
                )
            found.extend(method.problems_at(site, **self.arguments_at(site.name)))
            found.extend(self._projection_problems(site))
        return found

    def _projection_problems(self, site: Site) -> list[Problem]:
        smaller = min(site.m, site.n)
        return [
            Problem(
                piece=f"step {step.name}",
                needs=f"1 <= rank <= min(m, n) = {smaller}",
                has=f"rank is {step.rank} for a layer of {site.m} × {site.n}",
                remedy=f"use rank={smaller} or less, or leave the layer out with where=",
                sites=(site.name,),
            )
            for step in self.steps()
            if step.rank is not None and not 1 <= step.rank <= smaller
        ]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping, versioned."""
        data: dict[str, Any] = {"format": FORMAT, "name": self.name, "own": sorted(self.own), "ranks": dict(self.ranks)}
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
            **pieces,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        parts = [self.parameterization, self.start, *self.step, self.perturbation, self.schedule, self.procedure]
        return " + ".join(str(part) for part in parts if part is not None)


def _role_remedy(needed: frozenset[str], name: str) -> str:
    if "weight" in needed:
        return f"compose it with full ('full + {name}'), or drop it"
    if "gate" in needed:
        return "use a gated parameterization (gated_lora, or dora(inner=gated_lora)), or drop it"
    return "use a parameterization that trains both factors (lora, rslora, dora), or drop it"
