"""PEFT's adapter folder: adapter_config.json beside adapter_model.safetensors, read strictly and written whole.

Keys are `base_model.model.` + module path + `.` + a name of the method; tensors shared by all layers are `base_model.` + name,
and modules trained whole keep their plain key. Per layer, m = outputs and n = inputs of the (out, in) view of its weight:

    LORA    lora_A.weight (r, n), lora_B.weight (m, r)                       update s · B A, s = alpha / r or alpha / √r
            convolutions (r, in, kernel…), (m, r, 1…); embeddings lora_embedding_A (r, tokens), lora_embedding_B (width, r)
            with use_dora, lora_magnitude_vector (m), (1, m, 1…) for convolutions
    VERA    vera_lambda_b (m), vera_lambda_d (r); shared vera_A (r, widest n), vera_B (widest m, r)
                                                                             update diag(b) B[:m] diag(d) A[:, :n]

A key nobody knows, a missing half, a size that contradicts the config, or a field that changes the maths in a way that is not
supported here is an error. Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros

from rankwise.core.checkpoint import read_tensors
from rankwise.core.errors import CheckpointError, shorten
from rankwise.core.layouts import ConvLayout
from rankwise.core.operators import LowRank
from rankwise.core.targets import Target
from rankwise.interop.peft_config import at_pattern, check_config

CONFIG_NAME, TENSORS_NAME, PICKLED_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FINGERPRINT = "rankwise_fingerprint"  # in the metadata of the tensor file: site -> hash of the base's weight

PARTS = {
    "LORA": {
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude",
        "base_layer.weight": "base",  # PEFT adds the whole table when an embedding or the head is adapted
    },
    "VERA": {"vera_lambda_b": "b", "vera_lambda_d": "d", "base_layer.weight": "base"},
}
SHARED = {"LORA": {}, "VERA": {"base_model.vera_A": "A", "base_model.vera_B": "B"}}


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder holds.

    Attributes:
        folder: where it was read.
        config: the fields of adapter_config.json.
        kind: its peft_type.
        sites: layer -> part ("A", "B", "magnitude", "b", "d", "base") -> tensor.
        shared: part -> tensor of all layers.
        whole: name of a parameter of the model -> tensor that replaces it.
        metadata: of the tensor file.
    """

    folder: Path
    config: Mapping[str, Any]
    kind: str
    sites: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def magnitudes(self) -> bool:
        """Whether it is DoRA."""
        return bool(self.config.get("use_dora"))

    def rank_at(self, site: str) -> int:
        """The rank that the config states for a layer."""
        return int(at_pattern(self.config.get("rank_pattern"), site, self.config.get("r", {"LORA": 8, "VERA": 256}[self.kind])))

    def scale_at(self, site: str) -> float:
        """The scale s of a layer."""
        alpha = float(at_pattern(self.config.get("alpha_pattern"), site, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(self.rank_at(site)) if self.config.get("use_rslora") else self.rank_at(site))

    def factors(self, site: str) -> LowRank:
        """The update s · B A of a layer of kind LORA, scale folded into B; for DoRA, the part inside the norm."""
        B, A = self.sites[site]["B"], self.sites[site]["A"]
        return LowRank(B.reshape(B.shape[0], -1) * self.scale_at(site), A.reshape(A.shape[0], -1))  # (m, r), (r, n)


def read_peft(directory: str | Path) -> dict[str, LowRank]:
    """The updates of a PEFT LoRA adapter, without a model: layer -> (B, A), scale folded in.

    Args:
        directory: a folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: damaged files, or an adapter whose update cannot be told without its base (DoRA, VeRA).
    """
    adapter = read(Path(directory))
    if adapter.kind != "LORA" or adapter.magnitudes:
        what = "DoRA rescales the rows of the base" if adapter.magnitudes else "VeRA slices shared factors to the layers' sizes"
        raise CheckpointError(f"{directory}: {what}, so its update cannot be read without the model; use from_peft(model, …)")
    return {site: adapter.factors(site) for site in adapter.sites}


def read(folder: Path, *, ignore: Sequence[str] = ()) -> PeftAdapter:
    """Reads and checks a folder.

    Args:
        folder: with the two files.
        ignore: fields of the config that the caller takes responsibility for.

    Raises:
        CheckpointError: missing, damaged or contradicting files, or an adapter of a kind that is not supported.
    """
    path, tensors_path = folder / CONFIG_NAME, folder / TENSORS_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {CONFIG_NAME}, so it is no PEFT adapter (rankwise.load_ reads rankwise's own)"
        )
    if not tensors_path.is_file():
        pickled = (folder / PICKLED_NAME).is_file()
        hint = f"; {PICKLED_NAME} is pickled and is never opened here, save it again with safetensors" if pickled else ""
        raise CheckpointError(f"{folder} holds no {TENSORS_NAME}{hint}")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not the fields of an adapter")
    kind = check_config(path, config, frozenset(ignore))
    adapter = _sort(folder, config, kind, read_tensors(tensors_path), _metadata(tensors_path))
    _check_sizes(adapter)
    return adapter


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error


def _sort(
    folder: Path, config: Mapping[str, Any], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> PeftAdapter:
    """Gives every tensor its place."""
    sites: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        ending = next((name for name in PARTS[kind] if path.endswith(f".{name}")), None)
        if key in SHARED[kind]:
            shared[SHARED[kind][key]] = tensor
        elif path == key:
            unknown.append(key)
        elif ending is not None:
            sites.setdefault(path.removesuffix(f".{ending}"), {})[PARTS[kind][ending]] = tensor
        elif _is_whole(path, config.get("modules_to_save") or ()):
            whole[path] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} of {len(tensors)} tensors belong to nothing that a {kind} adapter has "
            f"({shorten(sorted(unknown))})"
        )
    if not sites:
        raise CheckpointError(f"{folder} holds {len(tensors)} tensors, none of which adapts a layer")
    return PeftAdapter(folder, config, kind, sites, shared, whole, metadata)


def _is_whole(path: str, modules: Iterable[str]) -> bool:
    owner = path.rpartition(".")[0]
    return any(f".{module}." in f".{owner}." for module in modules)


def _check_sizes(adapter: PeftAdapter) -> None:
    needed = {"A", "B"} | ({"magnitude"} if adapter.magnitudes else set()) if adapter.kind == "LORA" else {"b", "d"}
    for site, parts in adapter.sites.items():
        have = set(parts) - {"base"}
        if have != needed:
            raise CheckpointError(
                f"{adapter.folder}: {site} has {', '.join(sorted(have)) or 'nothing'} and needs {', '.join(sorted(needed))}"
            )
        rank = adapter.rank_at(site)
        if adapter.kind == "LORA":
            B, A = parts["B"], parts["A"]
            if B.dim() < 2 or A.dim() < 2 or B.shape[1] != A.shape[0]:
                raise CheckpointError(
                    f"{adapter.folder}: {site} has B {tuple(B.shape)} and A {tuple(A.shape)}, which do not fit"
                )
            found = A.shape[0]
            if adapter.magnitudes and parts["magnitude"].numel() != B.shape[0]:
                sizes = f"{parts['magnitude'].numel()} magnitudes for {B.shape[0]} outputs"
                raise CheckpointError(f"{adapter.folder}: {site} has {sizes}")
        else:
            found = parts["d"].numel()
        if found != rank:
            raise CheckpointError(
                f"{adapter.folder}: {site} has rank {found} in {TENSORS_NAME} and rank {rank} in {CONFIG_NAME}; one of the two "
                "files belongs to another adapter"
            )


def write(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], check: Any
) -> Path:
    """Writes an adapter so that a reader finds the old one, the new one or none, never half of each.

    Args:
        directory: made if need be; other files in it stay.
        config: for adapter_config.json.
        tensors: for adapter_model.safetensors.
        metadata: of the tensor file.
        check: called with the adapter as read back from the written files, before they take their names.

    Raises:
        CheckpointError: the folder cannot be written. What was there stays.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; choose a folder")
    staging, fresh = directory / f".writing-{os.getpid()}", not directory.exists()
    try:
        staging.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), staging / TENSORS_NAME, metadata={"format": "pt", **metadata})
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True))
        check(read(staging))
        (directory / CONFIG_NAME).unlink(missing_ok=True)
        os.replace(staging / TENSORS_NAME, directory / TENSORS_NAME)
        os.replace(staging / CONFIG_NAME, directory / CONFIG_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} could not be written ({error}); what was there before is still whole") from error
    finally:
        for leftover in (staging / TENSORS_NAME, staging / CONFIG_NAME):
            leftover.unlink(missing_ok=True)
        if staging.is_dir():
            staging.rmdir()
        if fresh and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    return directory


def put_factors(tensors: dict[str, Tensor], target: Target, pair: LowRank) -> None:
    """Adds B and A of one layer under PEFT's keys and in its shapes."""
    kind = "embedding_" if target.layout.kind == "embedding" else ""
    ending = "" if kind else ".weight"
    B, A = pair.B, pair.A
    if isinstance(target.layout, ConvLayout):
        A = A.reshape(A.shape[0], target.layout.channels, *target.layout.kernel)  # (r, in, kernel…)
        B = B.reshape(*B.shape, *(1 for _ in target.layout.kernel))  # (m, r, 1…)
    tensors[f"{PREFIX}{target.name}.lora_{kind}A{ending}"] = A
    tensors[f"{PREFIX}{target.name}.lora_{kind}B{ending}"] = B


def pad(pair: LowRank, rank: int) -> LowRank:
    """The same product with zero directions added."""
    missing = rank - pair.rank
    B = pad_with_zeros(pair.B, (0, missing))  # (m, rank)
    A = pad_with_zeros(pair.A, (0, 0, 0, missing))  # (rank, n)
    return LowRank(B, A)
