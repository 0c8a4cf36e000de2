"""Carrying out what schedules and procedures decide, optimizer state included."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.core.bindings import Adapters
from rankwise.core.merge import absorb_site
from rankwise.core.parameterization import Parameterization
from rankwise.core.queries import as_low_rank
from rankwise.core.randomness import MaskStream
from rankwise.core.sites import site_of
from rankwise.core.step import BlockOptimizer
from rankwise.core.targets import Target

RANK_DIMENSION = {"A": 0, "B": 1, "gate": 0}  # where a role's tensor holds the r directions


@torch.no_grad()
def mask(entry: Parameterization, keep: Tensor) -> None:
    """Zeroes the gate where keep (r,) is False."""
    gate = entry.roles()["gate"]
    gate.masked_fill_(~keep.to(gate.device), 0.0)


@torch.no_grad()
def resize(entry: Parameterization, keep: Tensor, optimizer: BlockOptimizer | None) -> None:
    """Cuts roles A, B and gate, and their optimizer state, down to the kept directions. The scale stays."""
    kept = keep.nonzero().squeeze(1)
    for name, parameter in list(entry.named_parameters()):
        owner_name, _, role = name.rpartition(".")
        if role not in RANK_DIMENSION:
            continue
        dimension = RANK_DIMENSION[role]
        owner = entry.get_submodule(owner_name) if owner_name else entry
        smaller = nn.Parameter(parameter.index_select(dimension, kept.to(parameter.device)), parameter.requires_grad)
        setattr(owner, role, smaller)
        if optimizer is not None:
            _replace(optimizer, parameter, smaller, dimension, kept)
    for module in entry.modules():
        if isinstance(module, Parameterization) and module.rank:
            module.rank = int(kept.numel())


def _replace(optimizer: BlockOptimizer, old: nn.Parameter, new: nn.Parameter, dimension: int, kept: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state: dict[str, Tensor] = optimizer.state.pop(old, {})
    if state:
        optimizer.state[new] = {
            name: value.index_select(dimension, kept.to(value.device)) if value.shape == old.shape else value
            for name, value in state.items()
        }


def freeze(entry: Parameterization, roles: frozenset[str], optimizer: BlockOptimizer | None) -> None:
    """Stops training the named roles and frees their optimizer state."""
    for role, parameter in entry.roles().items():
        if role in roles:
            parameter.requires_grad_(False)
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)


@torch.no_grad()
def restart(target: Target, name: str, moments: str | float, optimizer: BlockOptimizer | None, seed: int) -> None:
    """Absorbs the update into the weight, draws the factors again at zero, and resets or prunes the moments."""
    adapters = cast(Adapters, target.module._modules["adapter"])
    entry = adapters[name]
    update = as_low_rank(entry.update())
    if update is None:
        raise TypeError(f"{type(entry).__name__} cannot be restarted: its update has no factors; this is a bug in rankwise")
    absorb_site(target, name, update.folded())
    entry.restart(site_of(target, seed, MaskStream(seed)))
    if optimizer is None:
        return
    for parameter in entry.roles().values():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for value in state.values():
            if value.shape == parameter.shape:
                _prune(value, moments)


def _prune(value: Tensor, moments: str | float) -> None:
    """Zeroes a moment, or keeps its largest 1 - q fraction by magnitude."""
    if moments == "reset":
        value.zero_()
        return
    keep = round((1.0 - float(moments)) * value.numel())
    flat = value.flatten()
    chosen = flat.abs().topk(keep).indices
    pruned = torch.zeros_like(flat)
    pruned[chosen] = flat[chosen]
    value.copy_(pruned.view_as(value))
