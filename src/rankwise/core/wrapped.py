"""Models under a wrapper that trains them on several processes: what is trained has to be what the wrapper knows of.

DistributedDataParallel averages the gradients of the tensors that were there when it was made. Tensors that came later (a
narrower rank, factors in place of a weight, an adapter put on too late) would go their own way on every process without a
word, and for those that are gone it waits. FSDP cuts tensors into parts, which cannot be absorbed or made anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rankwise.core.errors import TrainingError, shorten
from rankwise.core.sharding import is_sharded

if TYPE_CHECKING:
    from rankwise.core.handle import Handle


class Wrapping:
    """Checks a wrapper at its first forward, and again after the trained tensors have changed.

    Args:
        handle: whose tensors.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle: Callable[[], Handle | None] = weakref.ref(handle)
        self._wrapper: Callable[[], Any] = _nothing
        self._known: dict[int, str] = {}  # the trained tensors when this wrapper was first seen
        self._checked = False
        self._hook = handle.model.register_forward_pre_hook(self._look)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of the model has no handle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._handle, self._wrapper, self._known, self._checked = _nothing, _nothing, {}, False

    def changed(self) -> None:
        """Called when tensors may have been replaced or frozen."""
        self._checked = False

    def close(self) -> None:
        """Stops looking."""
        self._hook.remove()

    def _look(self, model: nn.Module, *_: object) -> None:
        """Before every forward of the model.

        Raises:
            TrainingError: the wrapper does not know of what is trained.
        """
        if torch.compiler.is_compiling() or not torch.distributed.is_available() or not model.training:
            return
        wrapper: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        handle = self._handle()
        if wrapper is None or handle is None or (self._checked and self._wrapper() is wrapper):
            return
        _check_separate(handle, wrapper)
        trained = _trained(handle)
        if self._wrapper() is not wrapper:
            given = {id(tensor) for tensor in wrapper._module_parameters}
            self._wrapper, self._known = weakref.ref(wrapper), {key: name for key, name in trained.items() if key in given}
        unknown = sorted(trained[key] for key in trained.keys() - self._known.keys())
        gone = sorted(self._known[key] for key in self._known.keys() - trained.keys())
        if unknown or (gone and not wrapper.find_unused_parameters):
            lacks, waits = shorten(unknown) or "none", shorten(gone) or "none"
            raise TrainingError(
                "DistributedDataParallel was made before the trained tensors were what they are now: it does not know of "
                f"{lacks}, waits for {waits}, and the processes would go apart. Wrap the model again whenever tensors were "
                "replaced or frozen: model = DistributedDataParallel(handle.model)"
            )
        self._checked = True


def _nothing() -> None:
    return None


def _trained(handle: Handle) -> dict[int, str]:
    blocks = {**handle.blocks(), **handle.plain_blocks()}
    return {id(tensor): f"{site}.{role}" for site, block in blocks.items() for role, tensor in block.items()}


def _check_separate(handle: Handle, wrapper: Any) -> None:
    procedure = handle.procedure
    if procedure is not None and procedure.separate and torch.distributed.get_world_size(wrapper.process_group) > 1:
        raise TrainingError(
            f"with {type(procedure).__name__} every process trains tensors of its own, which DistributedDataParallel makes the "
            "same on all; adapt and train the bare model in every process, without a wrapper"
        )


def refuse_sharded(handle: Handle) -> None:
    """Checks that nothing has to absorb or remake tensors that are in parts.

    Raises:
        TrainingError: something has to.
    """
    procedure = handle.procedure
    if procedure is None or not (procedure.restarts or procedure.renews or procedure.separate):
        return
    if any(is_sharded(tensor) for block in handle.blocks().values() for tensor in block.values()):
        way = "train the bare model in every process, without a wrapper" if procedure.separate else "train it with DDP"
        raise TrainingError(
            f"{type(procedure).__name__} of the recipe {handle.recipe.name!r} absorbs or remakes whole tensors, and these are "
            f"sharded (FSDP); {way}"
        )
