"""Carrying out what schedules and procedures decide, optimizer state included."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rankwise.core.bank import BANKS, Bank
from rankwise.core.bindings import Adapters
from rankwise.core.errors import MergeError, TrainingError
from rankwise.core.merge import absorb_site
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.parameterization import Parameterization
from rankwise.core.protocols import Assign, Decision, Freeze, Keep, Mask, Renew, Resize, Restart
from rankwise.core.queries import as_low_rank
from rankwise.core.randomness import MaskStream, generator_for
from rankwise.core.sharding import is_sharded, sharded_like
from rankwise.core.sites import site_of
from rankwise.core.targets import Target, tied_with

if TYPE_CHECKING:
    from rankwise.core.handle import Handle

RANK_DIMENSION = {"A": 0, "B": 1, "gate": 0}  # where a role's tensor holds the r directions


def carry_out(handle: Handle, site: str, decision: Decision, optimizer: BlockOptimizer | None) -> None:
    """Carries out one decision at one site of a handle, or on the tensors that a group of sites shares (`Bank`)."""
    handle.wrapping.changed()
    if site.startswith(f"{BANKS}.") and isinstance(decision, Assign | Freeze):
        bank = cast(Bank, handle.model.get_submodule(site))
        assign(bank, decision.values) if isinstance(decision, Assign) else freeze(bank, decision.roles, optimizer)
        return
    entry = handle.parameterization(site)
    match decision:
        case Keep():
            pass
        case Mask(keep):
            mask(entry, keep)
        case Assign(values):
            assign(entry, values)
        case Resize(keep):
            resize(entry, keep, optimizer)
        case Freeze(roles):
            freeze(entry, roles, optimizer)
        case Renew(what, arguments):
            generator = generator_for(handle.seed, site, what, handle.step_count)
            renew(entry, site, what, generator, arguments, optimizer)
        case Restart(moments, rank):
            seed = zlib.crc32(f"restart/{handle.seed}/{handle.step_count}".encode())
            beside = bool(tied_with(handle.model, site))  # writing into a tied weight would change its twin
            restart(handle.targets[site], handle.name, moments, optimizer, seed, beside=beside)
            if rank is not None and rank < entry.rank:
                resize(entry, torch.arange(entry.rank) < rank, optimizer)


@torch.no_grad()
def mask(entry: Parameterization, keep: Tensor) -> None:
    """Zeroes the gate where keep (r,) is False."""
    gate = entry.roles()["gate"]
    dropped = sharded_like((~keep).to(gate.dtype), gate).bool()  # (r,)
    gate.copy_(torch.where(dropped, torch.zeros_like(gate), gate))


@torch.no_grad()
def assign(entry: Parameterization | Bank, values: Mapping[str, Tensor]) -> None:
    """Copies values into trained tensors."""
    roles = entry.roles()
    for role, value in values.items():
        roles[role].copy_(sharded_like(value, roles[role]))


@torch.no_grad()
def resize(entry: Parameterization, keep: Tensor, optimizer: BlockOptimizer | None) -> None:
    """Cuts roles A, B and gate, frozen ones too, and their optimizer state, down to the kept directions. The scale stays.

    Raises:
        TrainingError: a tensor is sharded.
    """
    kept = keep.nonzero().squeeze(1)  # (k,)
    found = [*entry.named_parameters(), *entry.named_buffers()]
    cut = [(name, tensor) for name, tensor in found if name.rpartition(".")[2] in RANK_DIMENSION]
    for name, tensor in cut:
        if is_sharded(tensor):
            raise TrainingError(f"{name} is sharded (FSDP); save the adapter, and prune it after load_ on one device")
    for name, tensor in cut:
        owner_name, _, role = name.rpartition(".")
        dimension = RANK_DIMENSION[role]
        smaller = tensor.index_select(dimension, kept.to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, tensor.requires_grad)
            if optimizer is not None:
                _replace(optimizer, tensor, smaller, dimension, kept)
        setattr(entry.get_submodule(owner_name), role, smaller)
    if optimizer is not None:
        _warn_of_wrappers()
    for module in entry.modules():
        if isinstance(module, Parameterization) and module.rank == keep.numel():
            module.rank = int(kept.numel())


def _warn_of_wrappers() -> None:
    """With several processes: tensors that are new are unknown to what averages gradients, and would drift apart."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            "trained tensors were replaced by others, which DistributedDataParallel does not know and would not average; wrap "
            "handle.model again before the next forward",
            stacklevel=2,
        )


def _replace(optimizer: BlockOptimizer, old: nn.Parameter, new: nn.Parameter, dimension: int, kept: Tensor) -> None:
    """Puts the cut tensor in the old one's place.

    State shaped like the tensor is cut with it. Any other (a preconditioner of r × r) belongs to the old directions: then the
    tensor begins again without state.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state: dict[str, Any] = optimizer.state.pop(old, {})
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    if state and all(value.dim() == 0 or value.shape == old.shape for value in tensors):
        optimizer.state[new] = {
            name: value.index_select(dimension, kept.to(value.device)) if isinstance(value, Tensor) and value.dim() else value
            for name, value in state.items()
        }


def freeze(entry: Parameterization | Bank, roles: frozenset[str], optimizer: BlockOptimizer | None) -> None:
    """Stops training the named roles and frees their optimizer state."""
    for role, parameter in entry.roles().items():
        if role in roles:
            parameter.requires_grad_(False)
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)


@torch.no_grad()
def renew(
    entry: Parameterization,
    site: str,
    what: str,
    generator: torch.Generator,
    arguments: Mapping[str, Any],
    optimizer: BlockOptimizer | None,
) -> None:
    """Lets a parameterization change its tensors, and takes the optimizer along.

    Raises:
        TrainingError: a tensor is sharded.
    """
    before = entry.roles()
    if any(is_sharded(tensor) for tensor in before.values()):
        raise TrainingError(f"{site} is sharded (FSDP), and its tensors are to {what} as a whole; train with DDP instead")
    changed = entry.renew(what, generator, **arguments)
    if optimizer is None:
        return
    after = entry.roles()
    optimizer.exchange(site, before, after)
    if before.keys() != after.keys() or any(after[role] is not tensor for role, tensor in before.items()):
        _warn_of_wrappers()
    for role, transport in changed.items():
        if role not in after:
            continue
        if transport is None:
            optimizer.state.pop(after[role], None)
            continue
        _transport(optimizer.state, after[role], transport)


def _transport(states: dict[Any, Any], tensor: Tensor, transport: Callable[[Tensor], Tensor]) -> None:
    """Moments follow as gradients do, and means of squares (…_sq) through their roots, so that none becomes negative.

    State of another form (codes of eight bits) cannot follow: then the tensor begins again without.
    """
    state: dict[str, Any] = states.get(tensor, {})
    moments = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
    if any(value.shape != tensor.shape for value in moments.values()):
        states.pop(tensor)
        return
    for name, value in moments.items():
        state[name] = transport(value.sqrt()).square() if name.endswith("_sq") else transport(value)


@torch.no_grad()
def restart(
    target: Target, name: str, moments: str | float, optimizer: BlockOptimizer | None, seed: int, *, beside: bool = False
) -> None:
    """Absorbs the update into the weight, draws the factors again at zero, and resets or prunes the moments.

    A weight that cannot be written (quantized) or must not be (`beside`, for tied ones) keeps its numbers: the old factors then
    go on acting beside it, frozen.

    Raises:
        TrainingError: the factors are sharded, or another adapter is merged into the weight.
    """
    adapters = cast(Adapters, target.module._modules["adapter"])
    entry = adapters[name]
    if any(is_sharded(parameter) for parameter in entry.parameters()):
        raise TrainingError(f"{target.name}: sharded factors (FSDP) cannot be restarted; train this recipe with DDP instead")
    update = as_low_rank(entry.update())
    if update is None:
        raise TypeError(f"{type(entry).__name__} cannot be restarted: its update has no factors; this is a bug in rankwise")
    weight = target.parameter()
    if entry.absorbed:
        beside = False
    if beside or not weight.is_floating_point() or type(weight) is not nn.Parameter:
        entry.carry(update, absorbed=False)
    else:
        try:
            absorb_site(target, name, update.folded())
        except MergeError as error:
            raise TrainingError(f"{target.name} cannot be restarted: {error}") from error
    entry.restart(site_of(target, seed, MaskStream(seed)))
    if optimizer is None:
        return
    for parameter in entry.roles().values():
        if moments == "fresh":
            optimizer.state.pop(parameter, None)
            continue
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
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
