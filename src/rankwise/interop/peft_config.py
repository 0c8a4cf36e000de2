"""adapter_config.json of PEFT: which fields are understood, which are refused because they change the maths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.core.errors import CheckpointError, shorten
from rankwise.interop.peft_method import PATTERNS, Fields, PeftMethod
from rankwise.interop.peft_methods import METHODS, OTHERWISE, WAYS_OUT

WITHOUT_EFFECT_HERE = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    "fan_in_fan_out",
}
MAY_BE_ZERO = {"boft_block_size", "oft_block_size"}  # beside those whose default is 0


def check_config(path: Path, config: Mapping[str, Any], ignore: frozenset[str], *, trainable: bool = True) -> PeftMethod:
    """The method of a config, once every field of it is known to be reproduced here.

    Raises:
        CheckpointError: another method, a field that changes the maths, or a value of the wrong type.
    """
    kind = config.get("peft_type")
    if kind not in METHODS:
        raise CheckpointError(
            f"{path} is of peft_type {kind!r}; rankwise reads {', '.join(METHODS)}. {WAYS_OUT.get(str(kind), OTHERWISE)}"
        )
    method = METHODS[kind]
    fields = Fields(config, method.defaults, ignore, trainable)
    _check_types(path, config, method)
    problems = [text for name, text in method.problems(fields) if name not in ignore]
    for key, value in config.items():
        if key in ignore or key in WITHOUT_EFFECT_HERE or key in method.understood or not value:
            continue
        if key in method.refused:
            problems.append(f"{key}={value!r} ({method.refused[key]})")
        elif key in method.training:
            if trainable:
                problems.append(
                    f"{key}={value!r} ({method.training[key]}; in training alone, so pass trainable=False to use it as it is)"
                )
        elif key not in method.defaults:
            problems.append(f"{key}={value!r} (a field that this rankwise does not know)")
    if config.get("bias") not in (None, "none") and "bias" not in ignore:
        problems.append(f"bias={config['bias']!r} (trained biases of the base)")
    if problems:
        raise CheckpointError(
            f"{path} asks for what rankwise cannot reproduce: {'; '.join(problems)}. If you know that a "
            "field has no effect on this adapter, pass its name in ignore="
        )
    return method


def _check_types(path: Path, config: Mapping[str, Any], method: PeftMethod) -> None:
    """Values of the type of their default; numbers finite, ranks and sizes whole and positive."""
    for name, default in method.defaults.items():
        pattern = PATTERNS.get(name)
        values = [] if config.get(name) is None else [config[name]]
        if pattern in method.understood and config.get(pattern):
            values += _values(path, config, pattern)
            name = f"{name} or {pattern}"
        kind = "true or false" if isinstance(default, bool) else "whole numbers" if isinstance(default, int) else "numbers"
        least = 1 if kind == "whole numbers" and default > 0 and name not in MAY_BE_ZERO else None
        if isinstance(default, str):
            kind, fits = "texts", [isinstance(value, str) for value in values]
        elif isinstance(default, bool):
            fits = [isinstance(value, bool) for value in values]
        else:
            types = int if kind == "whole numbers" else int | float
            fits = [isinstance(v, types) and not isinstance(v, bool) and math.isfinite(v) for v in values]
            fits = [fit and (least is None or value >= least) for fit, value in zip(fits, values, strict=True)]
        if not all(fits):
            least_said = f" from {least} on" if least else ""
            raise CheckpointError(f"{path}: {name} is {shorten([repr(v) for v in values])}, and takes {kind}{least_said}")


def _values(path: Path, config: Mapping[str, Any], key: str) -> list[Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key} is a {type(patterns).__name__}, not a mapping from layer names to numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{path}: {key} has the pattern {pattern!r}, which is no regular expression ({error})"
            ) from error
    return list(patterns.values())


def chosen_layers(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The layers that target_modules, exclude_modules and layers_to_transform choose."""
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":
        return []
    try:
        return [
            name
            for name in names
            if _fits(wanted, name)
            and not _fits(config.get("exclude_modules") or [], name)
            and not any(f".{module}." in f".{name}." for module in config.get("modules_to_save") or ())
            and (isinstance(wanted, str) or _layer_chosen(config, name))
        ]
    except (re.error, TypeError) as error:
        raise CheckpointError(f"{folder}: the config's choice of layers cannot be read ({error})") from error


def _fits(wanted: str | list[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def _layer_chosen(config: Mapping[str, Any], name: str) -> bool:
    """Whether layers_to_transform, where given, holds the first numbered part of a layer's path."""
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(expression, name) for expression in expressions) if match), None)
    return found is not None and int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)
