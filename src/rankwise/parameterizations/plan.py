"""A result kept between forwards, for as long as the tensors it was computed from have not changed.

Change is seen by torch's own counters: the storage and the version of each tensor. The plan holds aliases of the tensors, so
that their storage is not handed out again while it compares. Writes through `tensor.data` go past the counters; a module
that keeps a plan drops it in `train()`, in `eval()` and in every load, and in every forward with gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rankwise.core.transforms import transformed


class Plan:
    """One kept tensor, or none. A copied or pickled plan is empty."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._value: Tensor | None = None

    def find(self, sources: Sequence[Tensor]) -> Tensor | None:
        """The kept value, if it was computed from exactly these tensors as they are now."""
        if self._value is None or len(sources) != len(self._sources):
            return None
        for new, old, version in zip(sources, self._sources, self._versions, strict=True):
            if new.data_ptr() != old.data_ptr() or new._version != version or new.shape != old.shape or new.dtype != old.dtype:
                return None
        return self._value

    def keep(self, sources: Sequence[Tensor], value: Tensor) -> None:
        """Remembers a value and what it was computed from."""
        self._sources = tuple(tensor.detach() for tensor in sources)
        self._versions = tuple(tensor._version for tensor in sources)
        self._value = value

    def drop(self) -> None:
        """Forgets the value."""
        self._sources, self._versions, self._value = (), (), None

    def __reduce__(self) -> Any:
        return Plan, ()


def can_plan(sources: Sequence[Tensor]) -> bool:
    """Whether torch counts the changes of these tensors: plain ones, outside of compilation, torch.func and inference mode."""
    return not transformed() and all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in sources)
