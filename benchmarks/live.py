"""The exact peak of live tensor bytes: every tensor that an operation returns is counted until its memory is given back.

Scratch memory inside an operation (LAPACK's, a matrix product's packing) is no tensor and is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Follows the memory of tensors while it is active.

    Args:
        there: tensors that are live already (weights, optimizer state), which count from the start.

    Attributes:
        live: bytes now.
        peak: most bytes so far.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}  # by address of the storage object, while that lives
        for tensor in there:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it made."""
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        key = storage._cdata  # the memory's own record, one for all views of it
        if key in self._known or tensor.device.type == "meta":
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._gone, key, size)
        self._known[key].atexit = False

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
