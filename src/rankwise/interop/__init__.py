"""Doors to other libraries: PEFT's adapter files and transformers' Trainer. Nothing of theirs is imported until used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.interop.peft_export import to_peft
    from rankwise.interop.peft_files import read_peft
    from rankwise.interop.peft_import import from_peft
    from rankwise.interop.trainer import TrainerCallback

_HOMES = {"to_peft": "peft_export", "from_peft": "peft_import", "read_peft": "peft_files", "TrainerCallback": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.interop' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"rankwise.interop.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)


__all__ = ["TrainerCallback", "from_peft", "read_peft", "to_peft"]
