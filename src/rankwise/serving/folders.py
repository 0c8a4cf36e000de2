"""Reading adapters from folders as plain factors, no module built: what makes a hundred of them load in a second."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankwise.core.checkpoint import JSON_NAME, read
from rankwise.core.errors import CheckpointError, shorten
from rankwise.core.operators import LowRank
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.lora import LoRA
from rankwise.parameterizations.scaling import scale_of

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(LoRA).parameters.items()}


class StoredAdapter(NamedTuple):
    """Site -> factors, and site -> hash of the weight that the adapter was trained on."""

    updates: dict[str, LowRank]
    fingerprint: dict[str, str]


def read_adapter(directory: str | Path) -> StoredAdapter:
    """Reads an adapter of the LoRA family (any scale policy, frozen A, starts, cut ranks) from what `handle.save` wrote.

    Raises:
        CheckpointError: damaged files, or an adapter of another parameterization.
    """
    folder = Path(directory)
    description, tensors = read(folder)
    try:
        recipe = Recipe.from_json(description["recipe"])
        sites: Mapping[str, Any] = description["sites"]
        fingerprint = {str(site): str(value) for site, value in description["fingerprint"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / JSON_NAME} lacks {error}; it is damaged") from error
    if recipe.parameterization.factory is not LoRA:
        raise CheckpointError(
            f"{folder} holds {recipe.parameterization}, which a bank cannot read without its model; load it with "
            "handle = rankwise.load_(model, folder) and register(name, handle.updates()), where its updates have factors"
        )
    replaced = [site for site in sites if any(key.startswith(f"{site}.replacement.") for key in tensors)]
    if replaced:
        raise CheckpointError(
            f"{folder} replaces its base ({shorten(replaced)}), which the rows of other adapters do not share; "
            "use rankwise.load_"
        )
    if description.get("auxiliary"):
        raise CheckpointError(
            f"{folder} trains {', '.join(description['auxiliary'])} whole, which a bank cannot hold per row; use rankwise.load_"
        )
    updates = {site: _factors(site, tensors, _scale(recipe, site), folder) for site in sites}
    return StoredAdapter(updates, fingerprint)


def _scale(recipe: Recipe, site: str) -> float:
    """The scale a layer was built with. A rank that a schedule cut later does not change it."""
    known = {**_DEFAULTS, **recipe.arguments_at(site)}
    return scale_of(known["scale"], known["alpha"], known["rank"])


def _factors(site: str, tensors: Mapping[str, Tensor], scale: float, folder: Path) -> LowRank:
    B, A = tensors.get(f"{site}.B"), tensors.get(f"{site}.A")
    if B is None or A is None:
        raise CheckpointError(f"{folder}: {site} lacks a factor; the folder is damaged")
    carried_B, carried_A = tensors.get(f"{site}.carried_B"), tensors.get(f"{site}.carried_A")
    if carried_B is None or carried_A is None:
        return LowRank(B, A, scale)
    return LowRank(torch.cat([B * scale, carried_B], dim=1), torch.cat([A, carried_A]))
