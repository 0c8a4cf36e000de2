"""adapter_config.json of PEFT: which fields are understood, which are refused because they change the maths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.core.errors import CheckpointError, shorten

# Fields that change what the tensors mean; anything but an empty value is refused.
CHANGES_MATHS = {
    "LORA": {
        "lora_bias": "a trained bias beside B",
        "layer_replication": "layers repeated in the model",
        "trainable_token_indices": "replaced rows of the embedding",
        "target_parameters": "parameters adapted without their layer (fused experts)",
        "use_qalora": "pooled inputs",
        "velora_config": "compressed activations",
        "alora_invocation_tokens": "an update that acts only after certain tokens",
        "monteclora_config": "a sampled update",
        "use_bdlora": "block-diagonal factors",
        "arrow_config": "routing between adapters",
        "kasa_config": "a changed base and a diagonal between the factors",
        "megatron_config": "layers split over devices",
        "ensure_weight_tying": "factors shared between tied layers",
    },
    "VERA": {},
}
WITHOUT_EFFECT_HERE = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *(
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "fan_in_fan_out",
    ),
}
UNDERSTOOD = {
    "LORA": {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "runtime_config",
    },
    "VERA": {"r", "d_initial", "vera_dropout", "projection_prng_key", "save_projection", "init_weights"},
}
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # values of init_lora_weights that leave W alone


def check_config(path: Path, config: Mapping[str, Any], ignore: frozenset[str]) -> str:
    """The peft_type of a config, once every field of it is known to be reproduced here.

    Raises:
        CheckpointError: another method, a field that changes the maths, or a value of the wrong type.
    """
    kind = config.get("peft_type")
    if kind not in UNDERSTOOD:
        raise CheckpointError(
            f"{path} is of peft_type {kind!r}; rankwise reads {' and '.join(UNDERSTOOD)}. If it is of low rank, "
            "convert it to LORA with peft (save_as_lora) first"
        )
    problems = []
    for key, value in config.items():
        if key in ignore or key in WITHOUT_EFFECT_HERE or key in UNDERSTOOD[kind]:
            continue
        if key in CHANGES_MATHS[kind]:
            if value:
                problems.append(f"{key}={value!r} ({CHANGES_MATHS[kind][key]})")
        elif value:
            problems.append(f"{key}={value!r} (a field that this rankwise does not know)")
    if config.get("bias", "none") != "none" and "bias" not in ignore:
        problems.append(f"bias={config['bias']!r} (trained biases of the base)")
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE and "init_lora_weights" not in ignore:
        problems.append(
            f"init_lora_weights={start!r} (the adapter belongs to a base that this start has changed; save it with "
            "path_initial_model_for_weight_conversion, which writes it for the untouched base)"
        )
    if problems:
        raise CheckpointError(
            f"{path} asks for what rankwise cannot reproduce: {'; '.join(problems)}. If you know that a "
            "field has no effect on this adapter, pass its name in ignore="
        )
    _check_types(path, config, kind)
    return str(kind)


def _check_types(path: Path, config: Mapping[str, Any], kind: str) -> None:
    ranks = [config.get("r", 8), *_values(path, config, "rank_pattern")]
    if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 for rank in ranks):
        raise CheckpointError(
            f"{path}: r and rank_pattern hold {shorten([str(rank) for rank in ranks])}; ranks are whole numbers"
        )
    if kind == "LORA":
        alphas = [config.get("lora_alpha", 8), *_values(path, config, "alpha_pattern")]
        if any(not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) for alpha in alphas):
            raise CheckpointError(f"{path}: lora_alpha and alpha_pattern hold {shorten([str(a) for a in alphas])}, not numbers")


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


def at_pattern(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a layer's path at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", site):
            return value
    return default


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
