"""A `Piece`: a registered factory with its arguments, which can be written as JSON and read back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rankwise.core.errors import ArgumentError, CheckpointError, did_you_mean

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
