"""Which parameters of the model require gradients: adapters and what is trained whole, and the user's flags back at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.core.bank import BANKS
from rankwise.core.bindings import adapted_layers

if TYPE_CHECKING:
    from rankwise.core.handle import Handle

_FLAGS = "_rankwise_requires_grad"  # on the model: which parameters required gradients before the first adapter


def freeze(model: nn.Module, auxiliary: Mapping[str, nn.Parameter]) -> None:
    """Freezes all but adapters and auxiliary tensors. The flags as the user had them are kept on the model for `thaw`."""
    kept = {id(parameter) for parameter in auxiliary.values()}
    flags: dict[str, bool] = model.__dict__.setdefault(_FLAGS, {})
    for name, parameter in model.named_parameters():
        if ".adapter." in f".{name}" or name.startswith(f"{BANKS}."):
            continue
        first = name not in flags
        flags.setdefault(name, parameter.requires_grad)
        if id(parameter) in kept or first:
            parameter.requires_grad_(id(parameter) in kept)


def thaw(model: nn.Module) -> None:
    """Gives the user's flags back once no adapter is left."""
    if next(adapted_layers(model), None) is not None:
        return
    flags: dict[str, bool] = model.__dict__.pop(_FLAGS, {})
    for name, parameter in model.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])


def frozen_roles(handle: Handle) -> dict[str, list[str]]:
    """Site, or group of shared tensors, -> roles that are not trained any more."""
    owners: dict[str, Any] = {site: handle.parameterization(site) for site in handle.targets}
    if handle.bank is not None:
        owners |= dict(handle.bank.named_modules(prefix=f"{BANKS}.{handle.name}"))
    frozen = {name: [role for role, p in owner.roles().items() if not p.requires_grad] for name, owner in owners.items()}
    return {name: roles for name, roles in frozen.items() if roles}
