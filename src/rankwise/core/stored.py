"""The update that an adapter folder holds for one layer, as factors, without a model, for methods that start from others."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.core.bank import BANKS, Bank
from rankwise.core.checkpoint import JSON_NAME, read
from rankwise.core.errors import CheckpointError, did_you_mean
from rankwise.core.layouts import LinearLayout
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import Parameterization, Site
from rankwise.core.queries import as_low_rank
from rankwise.core.recipe import Recipe


@torch.no_grad()
def stored_update(folder: str | Path, site: Site) -> LowRank:
    """The exact factors of the update at one layer, scale folded in, in the file's precision.

    Args:
        folder: what `handle.save` wrote.
        site: the layer, of the same base.

    Raises:
        CheckpointError: no such layer in the file, another size, or an update that is not of low rank.
    """
    description, tensors = _read(Path(folder), _stamp(Path(folder)))
    sites: dict[str, Any] = description["sites"]
    if site.name not in sites:
        raise CheckpointError(f"{folder} adapts no layer {site.name!r}. {did_you_mean(site.name, sites)}")
    stored = sites[site.name]
    if (stored["m"], stored["n"]) != (site.m, site.n):
        raise CheckpointError(
            f"{folder}: {site.name} is {stored['m']}×{stored['n']} in the file and {site.m}×{site.n} here; another base?"
        )
    recipe = Recipe.from_json(description["recipe"])
    if not (recipe.method.facts.additive and recipe.method.facts.exact_lora_export):
        raise CheckpointError(f"{folder} holds {recipe.name!r}, whose update has no factors; take an adapter of low rank")
    bank = _bank(recipe, description, tensors, site)
    method: Any = recipe.method
    here = dataclasses.replace(site, seed=int(description["seed"]), bank=bank, blank=True)
    entry: Parameterization = method(here, **recipe.arguments_at(site.name))
    inside = {key.removeprefix(f"{site.name}."): value for key, value in tensors.items() if key.startswith(f"{site.name}.")}
    for key, value in inside.items():  # sizes and precision are the file's
        owner, _, role = key.rpartition(".")
        setattr(entry.get_submodule(owner), role, _like(getattr(entry.get_submodule(owner), role), value))
    carried = entry.carried()
    factors = as_low_rank(entry.update())
    assert factors is not None
    pair = factors.folded()
    if carried is None:
        return LowRank(pair.B.detach(), pair.A.detach())
    return LowRank(torch.cat([pair.B, carried.B], dim=1).detach(), torch.cat([pair.A, carried.A]).detach())


def _like(place: Tensor | None, value: Tensor) -> Tensor:
    return torch.nn.Parameter(value, requires_grad=False) if isinstance(place, torch.nn.Parameter) else value


def _bank(recipe: Recipe, description: dict[str, Any], tensors: dict[str, Tensor], site: Site) -> Bank | None:
    """The shared tensors of the folder: drawn again from their seed, or read."""
    described = description["bank"]
    if described is None:
        return None
    sites = [
        Site(name=name, m=stored["m"], n=stored["n"], layout=LinearLayout(), weight=_no_weight)
        for name, stored in description["sites"].items()
    ]
    seed = int(description["seed"])
    sites = [dataclasses.replace(other, seed=seed, dtype=site.dtype, device=site.device) for other in sites]
    if described.get("seed") is None:
        bank: Bank | None = Bank.blank(described, sites[0].zeros(1))
    else:
        bank = recipe.method.shared(sites, **recipe.parameterization.arguments)
        assert bank is not None
        bank.check(described)
    held = {key.removeprefix(f"{BANKS}."): value for key, value in tensors.items() if key.startswith(f"{BANKS}.")}
    assert bank is not None
    bank.load_state_dict(held, assign=True)
    return bank


def _no_weight() -> Tensor:
    raise CheckpointError("a shared tensor is read off the weights, which a folder of adapters does not have")


def _stamp(folder: Path) -> tuple[int, int]:
    """What changes when a folder is written again."""
    path = folder / JSON_NAME
    if not path.is_file():
        read(folder)  # says what is wrong
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _read(folder: Path, stamp: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read(folder)
