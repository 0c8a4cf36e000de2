"""Composition: recipes, catalog names and texts such as "dora(rank=4) + reflora + bar" into one recipe.

Each published name owns some fields of a recipe and has defaults for the rest. In a composition an owned field wins over a
default; two owners of one field are refused, except for steps, which chain. So "dora + pissa" is DoRA's parameterization
with PiSSA's start, and "lora + bar" is LoRA with BAR.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

from rankwise.core import catalog
from rankwise.core.errors import ArgumentError, Problem, RecipeError, did_you_mean
from rankwise.core.piece import SHELVES, Piece
from rankwise.core.recipe import Recipe
from rankwise.core.step import MOMENTS


def compose(*parts: Recipe | str, name: str | None = None, **pieces: Piece) -> Recipe:
    """Builds one recipe out of recipes, texts and pieces.

    Args:
        *parts: recipes, or texts like "lora(rank=8) + lora_plus(ratio=16)".
        name: for the result; default: the texts joined by "+".
        **pieces: `parameterization=`, `start=`, `step=`, `perturbation=`, `schedule=`, `procedure=`, which win over the parts.

    Raises:
        ArgumentError: an unknown method or argument.
        RecipeError: two parts decide the same field.
    """
    recipes = [recipe for part in parts for recipe in (_parse(part) if isinstance(part, str) else [part])]
    if not recipes and "parameterization" not in pieces:
        raise ArgumentError("compose() needs at least one recipe, text, or a parameterization= piece")
    for key in pieces:
        if key not in SHELVES:
            raise ArgumentError(f"compose() has no field {key!r}. {did_you_mean(key, SHELVES)}")
    fields = {shelf: _decide(shelf, recipes, pieces) for shelf in SHELVES if shelf != "step"}
    own = frozenset(pieces) | frozenset().union(*(recipe.own for recipe in recipes))
    steps = (pieces["step"],) if "step" in pieces else _steps(recipes)
    if fields["parameterization"] is None:
        fields["parameterization"] = _parse("lora")[0].parameterization
    ranks = {site: rank for recipe in recipes for site, rank in recipe.ranks.items()}
    deciding = [recipe for recipe in recipes if recipe.parameterization == fields["parameterization"]]
    overrides = {site: arguments for recipe in deciding for site, arguments in recipe.overrides.items()}
    joined = name or " + ".join(recipe.name for recipe in recipes) or str(fields["parameterization"])
    return Recipe(name=joined, step=steps, own=own, ranks=ranks, overrides=overrides, **fields)  # type: ignore[arg-type]


def _decide(shelf: str, recipes: list[Recipe], pieces: dict[str, Piece]) -> Piece | None:
    if shelf in pieces:
        return pieces[shelf]
    owners = [recipe for recipe in recipes if shelf in recipe.own]
    if len(owners) > 1:
        one, other = owners[0].name, owners[1].name
        problem = Problem(
            piece=f"the {shelf}",
            needs="one method that decides it",
            has=f"both {one} and {other} do",
            remedy=f"keep {one} or {other}",
        )
        raise RecipeError(" + ".join(recipe.name for recipe in recipes), [problem])
    if owners:
        return getattr(owners[0], shelf)
    return next((getattr(recipe, shelf) for recipe in recipes if getattr(recipe, shelf) is not None), None)


def _steps(recipes: list[Recipe]) -> tuple[Piece, ...]:
    """Chains what owners bring; a default that makes the update (AdamW) is used once, and only if no owner makes it."""
    owned = [step for recipe in recipes if "step" in recipe.own for step in recipe.step]
    unique: list[Piece] = []
    makers_owned = [recipe for recipe in recipes if "step" in recipe.own and _owns_maker(recipe)]
    for step in owned:
        is_default_maker = step.name == "adamw" and not step.arguments
        if is_default_maker and (makers_owned or step in unique):
            continue
        if not step.arguments and any(other.name == step.name and other.arguments for other in owned):
            continue  # named with its defaults by a method that needs it, and with arguments by the user
        if step not in unique:
            unique.append(step)
    if not any(step.build().stage == MOMENTS for step in unique):
        defaults = [step for recipe in recipes if "step" not in recipe.own for step in recipe.step]
        makers = [step for step in defaults if step.build().stage == MOMENTS] or [Piece("step", "adamw")]
        # AdamW is everyone's default; a recipe with another one (SGD under zeroth-order estimates) means it.
        unique.append(next((step for step in makers if step.name != "adamw"), makers[0]))
    return tuple(unique)


def _owns_maker(recipe: Recipe) -> bool:
    """Whether a recipe insists on how the update is made, rather than naming plain AdamW as its default."""
    return any(step.build().stage == MOMENTS and not (step.name == "adamw" and not step.arguments) for step in recipe.step)


def _parse(text: str) -> list[Recipe]:
    """The recipes of a text like "lora(rank=8) + bar"; the text is read as an expression and never executed."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ArgumentError(f"{text!r} is no recipe; write names joined by +, such as 'lora(rank=8) + bar'") from error
    return [_call(node, text) for node in _terms(tree)]


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _call(node: ast.expr, text: str) -> Recipe:
    arguments: dict[str, Any] = {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        name = node.func.id
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ArgumentError(f"{text!r}: write arguments as name=value")
            arguments[keyword.arg] = _value(keyword.value, text)
    elif isinstance(node, ast.Name):
        name = node.id
    else:
        raise ArgumentError(f"{text!r} is no recipe; write names joined by +, such as 'lora(rank=8) + bar'")
    return make(name, **arguments)


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name | ast.Call):  # a nested recipe, as in dora(inner=vera(rank=64)), or a bare word
        if isinstance(node, ast.Name) and node.id not in catalog.names():
            return node.id
        return _call(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ArgumentError(f"{text!r}: {ast.unparse(node)!r} is no number, text or recipe") from error


def make(slug: str, /, **arguments: Any) -> Recipe:
    """The recipe of a catalog entry, arguments checked by name.

    Raises:
        ArgumentError: an unknown method or argument, or an entry that is no recipe.
    """
    kept = catalog.get(slug)
    if kept.shelf not in SHELVES:
        raise ArgumentError(f"{slug} is on the shelf {kept.shelf!r}; it is called directly and is no part of a training recipe")
    accepted = inspect.signature(kept.make).parameters
    for argument in arguments:
        if argument not in accepted:
            raise ArgumentError(f"{slug} has no argument {argument!r}. {did_you_mean(argument, accepted)}")
    missing = [key for key, value in accepted.items() if value.default is value.empty and key not in arguments]
    if missing:
        raise ArgumentError(f"{slug} needs {', '.join(missing)}: write {slug}({', '.join(f'{key}=…' for key in missing)})")
    recipe: Recipe = kept.make(**arguments)
    said = ", ".join(f"{key}={_said(value)}" for key, value in arguments.items())
    return Recipe(**{**recipe.__dict__, "name": f"{slug}({said})" if said else slug})


def _said(value: Any) -> str:
    return value.name if isinstance(value, Recipe) else repr(value) if isinstance(value, str) else str(value)
