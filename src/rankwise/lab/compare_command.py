"""`rankwise compare` between its options and the library: presets, defaults, and what is missing.

An option that is given wins over the preset, and the preset over the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.core.errors import ArgumentError, did_you_mean
from rankwise.lab.presets import PRESETS
from rankwise.lab.result import ComparisonResult

DEFAULTS: Mapping[str, Any] = {"seeds": 3, "lrs": ("auto",), "rates": 5, "batch_size": 16, "probes": 8, "retention": "auto"}


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as given, over the preset's, over the defaults.

    Raises:
        ArgumentError: an unknown preset, or something that is needed is missing.
    """
    preset = given.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ArgumentError(f"no preset {preset!r}. {did_you_mean(preset, PRESETS)}")
    chosen = {**DEFAULTS, **PRESETS.get(preset or "", {}), **{key: value for key, value in given.items() if value is not None}}
    missing = [f"--{key}" for key in ("model", "data", "recipes", "steps", "out") if chosen.get(key) is None]
    if missing:
        raise ArgumentError(f"compare needs {', '.join(missing)}; see rankwise compare --help, or use --preset demo")
    return chosen


def run(given: Mapping[str, Any], command: str = "") -> ComparisonResult:
    """Runs the comparison that the options describe.

    Args:
        given: options by name; None where not given.
        command: as typed, for the report.
    """
    chosen = settings(given)
    if chosen.get("threads"):
        import torch

        torch.set_num_threads(int(chosen["threads"]))
    from rankwise.lab.compare import run_compare
    from rankwise.lab.tasks import make_task

    names = ("task", "evaluation", "columns", "max_length", "image_size", "train_limit", "eval_limit", "retention", "device")
    task = make_task(chosen["model"], chosen["data"], **{name: chosen[name] for name in names if chosen.get(name) is not None})
    return run_compare(
        task,
        chosen["recipes"],
        steps=chosen["steps"],
        batch_size=chosen["batch_size"],
        seeds=chosen["seeds"],
        learning_rates=_rates(chosen["lrs"]),
        rates=chosen["rates"],
        probes=chosen["probes"],
        out=Path(chosen["out"]),
        command=command,
    )


def _rates(texts: Sequence[str]) -> str | list[float]:
    if list(texts) == ["auto"]:
        return "auto"
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        raise ArgumentError(f"--lrs is auto or numbers such as 1e-4 3e-4, not {' '.join(texts)}") from error
