"""Layers of one stack that share parameters without being one module, and low-rank factors beside their linear maps.

Every depth keeps its own modules, with what is theirs beside parameters: its number for the KV cache, its kind of attention,
its buffers. Only the tensors are shared. A tied module at depth l ≥ K loses its parameter; its generated class reads it from
the module of the same name at depth l mod K, the owner, which is referred to without being a child. So state dict and optimizer
meet a shared tensor once, autograd sums over depths, and checkpointed regions may run again in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, TargetError, did_you_mean, shorten
from rankwise.core.layouts import Layout
from rankwise.core.operators import LowRank
from rankwise.core.targets import Target, find_targets, tied_with

OWNER, ORDER = "_rankwise_owner", "_rankwise_order"  # entries in the __dict__ of a tied module
CHILD = "relaxation"  # name of the child that holds a depth's factors


class Relaxation(nn.Module):
    """The factors of one linear map at one depth: B (m, r), A (r, n), no scale."""

    def __init__(self, B: Tensor, A: Tensor, layout: Layout) -> None:
        super().__init__()
        self.B, self.A, self.layout = nn.Parameter(B), nn.Parameter(A), layout

    def operator(self) -> LowRank:
        """B A."""
        return LowRank(self.B, self.A)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Y + B A x."""
        return self.operator().add_to(y, x, self.layout)


@functools.cache
def looped_class(original: type[nn.Module], tied: tuple[str, ...], relaxed: bool) -> type[nn.Module]:
    """The generated subclass of a layer class whose tied parameters are the owner's, with factors beside it if relaxed."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self._modules[CHILD].add_to(cast(Any, original).forward(self, x), x)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (original, tied, relaxed), self.__getstate__()

    members: dict[str, Any] = {"__reduce_ex__": reduce, "__module__": original.__module__, "_rankwise_looped": original}
    for name in tied:
        members[name] = property(functools.partial(_from_owner, name=name))
    if relaxed:
        members["forward"] = forward
    return type(original.__name__, (original,), members)


def _from_owner(module: nn.Module, *, name: str) -> Tensor:
    return getattr(getattr(module, OWNER), name)


def _rebuild(original: type[nn.Module], tied: tuple[str, ...], relaxed: bool) -> nn.Module:
    generated = looped_class(original, tied, relaxed)
    return generated.__new__(generated)


def loop_(module: nn.Module, owner: nn.Module | None, tied: Iterable[str], relaxation: Relaxation | None) -> None:
    """Gives a module's parameters named in `tied` away to the owner's, and puts factors beside it."""
    names = tuple(tied) if owner is not None else ()
    if not names and relaxation is None:
        return
    module.__dict__[ORDER] = tuple(module._parameters)
    module.__dict__[OWNER] = owner
    for name in names:
        del module._parameters[name]
    if relaxation is not None:
        module.add_module(CHILD, relaxation)
    module.__class__ = looped_class(type(module), names, relaxation is not None)


def unloop_(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Gives a module its class back, and parameters of its own for those that were tied."""
    looped = getattr(type(module), "_rankwise_looped", None)
    if looped is None:
        return
    module.__class__ = looped
    module._modules.pop(CHILD, None)
    del module.__dict__[OWNER]
    kept: dict[str, Any] = {**module._parameters, **parameters}
    module._parameters.clear()
    module._parameters.update({name: kept[name] for name in module.__dict__.pop(ORDER)})


def find_stack(model: nn.Module, layers: str | None) -> tuple[str, list[nn.Module]]:
    """The dotted name and the layers of the stack to loop: the longest ModuleList of one class, or the one named.

    Raises:
        TargetError: there is none, it is not clear which, or it is adapted or looped already.
    """
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and len({type(layer) for layer in module}) == 1
    }
    if layers is not None:
        found = [name for name in stacks if name == layers or name.endswith(f".{layers}")]
        if len(found) != 1:
            said = f"{shorten(found)} all end so; give the whole name" if found else did_you_mean(layers, stacks)
            raise TargetError(f"layers={layers!r} is not one list of two or more layers of one class. {said}")
    else:
        lists = [name for name, module in stacks.items() if isinstance(module, nn.ModuleList)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other)]
        most = max((len(stacks[name]) for name in outer), default=0)
        found = [name for name in outer if len(stacks[name]) == most]
        if len(found) != 1:
            said = f"{shorten(found)} are equally long" if found else "this model has no ModuleList of layers of one class"
            raise TargetError(f"which layers to loop is not clear: {said}; name the list with layers=")
    blocks = list(cast(Iterable[nn.Module], stacks[found[0]]))
    _check_free(found[0], blocks)
    return found[0], blocks


def _check_free(name: str, blocks: list[nn.Module]) -> None:
    """Nothing may act on these layers yet, and each must have tensors of its own."""
    first = shapes_of(blocks[0])
    for depth, block in enumerate(blocks):
        if shapes_of(block) != first:
            different = sorted(set(shapes_of(block).items()) ^ set(first.items()))
            raise TargetError(f"{name}.{depth} is not like {name}.0, so that they cannot share parameters: {different[:3]}")
        for path, module in block.named_modules():
            here = f"{name}.{depth}.{path}".rstrip(".")
            if hasattr(type(module), "_rankwise_looped"):
                raise TargetError(f"{here} is looped already; call unroll_() on the relaxed recursive model first")
            if "adapter" in module._modules:
                raise TargetError(f"{here} carries an adapter; merge it and take it off (handle.merge_, handle.detach_) first")
            if isinstance(module, nn.RNNBase):
                raise TargetError(f"{here} is a {type(module).__name__}, which keeps its weights where they cannot be shared")
            for key, tensor in module._parameters.items():
                if tensor is not None and (type(tensor) is not nn.Parameter or not tensor.is_floating_point()):
                    raise TargetError(
                        f"{here}.{key} is quantized ({tensor.dtype}); shared weights are trained, so load it plain"
                    )
    every = [parameter for block in blocks for parameter in block.parameters()]
    if len({id(parameter) for parameter in every}) < len(every):
        raise TargetError(f"some layers of {name} share parameters already; there is nothing to loop")


def shared_names(module: nn.Module, vectors: str) -> tuple[str, ...]:
    """The module's own parameters that depths share: all, or with vectors="own" those of two dimensions and more."""
    found = ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    return tuple(name for name, tensor in found if vectors == "tied" or tensor.dim() > 1)


def shapes_of(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape."""
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}


def linear_maps(block: nn.Module, name: str) -> dict[str, Target]:
    """The linear and convolutional layers of a block by path.

    Raises:
        TargetError: it has none, or one whose factors would not act.
    """
    targets, skipped = find_targets(block, "all-layers")
    for path, reason in skipped.items():
        if not isinstance(block.get_submodule(path), nn.Embedding):
            raise TargetError(f"{name}: {path} cannot have factors of its own at every depth: {reason}")
    for path in targets:
        same = [other for other in tied_with(block, path) if other != f"{path}.weight".lstrip(".")]
        if same:
            raise TargetError(f"{name}: {path}.weight is the same tensor as {shorten(same)}; untie them first")
    return targets


def check_loops(count: int, loops: int) -> None:
    """Refuses numbers of loops that do not divide the number of layers.

    Raises:
        ArgumentError: with those that do.
    """
    fitting = [number for number in range(2, count + 1) if count % number == 0]
    if loops not in fitting:
        raise ArgumentError(
            f"loops={loops} does not divide {count} layers into blocks; it can be {shorten([*map(str, fitting)])}"
        )


def wide(tensor: Tensor) -> Tensor:
    """Detached, in at least float32."""
    plain = tensor.detach()
    return plain.float() if plain.dtype in (torch.float16, torch.bfloat16) else plain
