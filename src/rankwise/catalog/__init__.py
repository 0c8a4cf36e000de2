"""The table of contents of the field: one short function per published name.

catalog.lora(rank=8)          a recipe (parameterizations, starts, steps, perturbations, schedules, procedures)
catalog.iteris                a ready callable (networks, mergers, compressors, certificates, serving, problems)
catalog.names("start")        the slugs of a shelf, or all of them
catalog.entry("lora")         shelf, formula, reference, facts
"""

from __future__ import annotations

import importlib
from typing import Any

from rankwise.core.catalog import Entry, names
from rankwise.core.catalog import get as entry
from rankwise.core.errors import ArgumentError

MODULES = (
    "parameterizations",
    "spectral",
    "shared",
    "rotations",
    "high_rank",
    "sparse",
    "tensors",
    "starts",
    "data_starts",
    "steps",
    "projections",
    "factor_steps",
    "perturbations",
    "forward_only",
    "schedules",
    "procedures",
    "chains",
    "from_scratch",
    "shrinking",
    "networks",
    "merging",
    "compression",
    "certificates",
    "serving",
    "problems",
)
for _module in MODULES:
    importlib.import_module(f"rankwise.catalog.{_module}")


def __getattr__(slug: str) -> Any:
    if slug.startswith("__"):
        raise AttributeError(slug)
    try:
        return entry(slug).make
    except ArgumentError as error:
        raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    return [*names(), "entry", "names"]


__all__ = ["Entry", "entry", "names"]
