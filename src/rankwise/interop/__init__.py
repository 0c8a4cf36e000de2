"""Doors to other libraries: PEFT's adapter files and transformers' Trainer. Nothing of theirs is imported until used.

`from_peft` reads every adapter type of peft 0.21 (the table is in `peft_methods`): LORA with its scales and DoRA, ADALORA,
VERA, RANDLORA, VBLORA, LOHA, LOKR, HIRA, GRALORA, DELORA, FOURIERFT, C3A, SHIRA, MISS, OFT, BOFT, HRA, IA3, ROAD. `to_peft`
writes LORA, or with native=True DoRA, rsLoRA and VeRA in their own form.
"""

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
