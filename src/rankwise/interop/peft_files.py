"""PEFT's adapter folder: adapter_config.json beside adapter_model.safetensors, read strictly and written whole.

Keys are `base_model.model.` + module path + `.` + a name of the method; tensors shared by all layers are `base_model.` + name,
and modules trained whole keep their plain key. Per layer, m = outputs and n = inputs of the (out, in) view of its weight:

    LORA    lora_A.weight (r, n), lora_B.weight (m, r)                       update s · B A, s = alpha / r or alpha / √r
            convolutions (r, in, kernel…), (m, r, 1…); embeddings lora_embedding_A (r, tokens), lora_embedding_B (width, r)
            with use_dora, lora_magnitude_vector (m), (1, m, 1…) for convolutions
    VERA    vera_lambda_b (m), vera_lambda_d (r); shared vera_A (r, widest n), vera_B (widest m, r)
                                                                             update diag(b) B[:m] diag(d) A[:, :n]

The other types are listed in `peft_methods`, with the shapes of their tensors in letters (see `peft_method`).

A key nobody knows, a missing half, a size that contradicts the config, or a field that changes the maths in a way that is not
supported here is an error. Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros

from rankwise.core.checkpoint import read_tensors
from rankwise.core.errors import CheckpointError, shorten
from rankwise.core.layouts import ConvLayout
from rankwise.core.operators import LowRank
from rankwise.core.targets import Target
from rankwise.interop.peft_config import check_config
from rankwise.interop.peft_method import Fields, PeftMethod, contradiction, letters_of
from rankwise.interop.peft_methods import METHODS
from rankwise.parameterizations.scaling import scale_of

CONFIG_NAME, TENSORS_NAME, PICKLED_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FINGERPRINT = "rankwise_fingerprint"  # in the metadata of the tensor file: site -> hash of the base's weight

BASE = "base_layer.weight"  # PEFT adds the whole table when an embedding or the head is adapted


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder holds.

    Attributes:
        folder: where it was read.
        config: the fields of adapter_config.json.
        kind: its peft_type.
        sites: layer -> part (for LORA "A", "B", "magnitude"; "base" for a base weight) -> tensor.
        letters: layer -> letter of the shapes -> size.
        shared: part -> tensor of all layers.
        whole: name of a parameter of the model -> tensor that replaces it.
        metadata: of the tensor file.
        fields: the config with the defaults of the type.
    """

    folder: Path
    config: Mapping[str, Any]
    kind: str
    sites: Mapping[str, Mapping[str, Tensor]]
    letters: Mapping[str, Mapping[str, int]]
    shared: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    fields: Fields

    @property
    def method(self) -> PeftMethod:
        """The entry of its type."""
        return METHODS[self.kind]

    @property
    def magnitudes(self) -> bool:
        """Whether it is DoRA."""
        return self.kind == "LORA" and bool(self.fields.at("use_dora"))

    def scale_at(self, site: str) -> float:
        """The scale s of a layer of kind LORA."""
        policy = "rslora" if self.fields.at("use_rslora") else "lora"
        return scale_of(policy, float(self.fields.at("lora_alpha", site)), int(self.fields.at("r", site)))

    def factors(self, site: str) -> LowRank:
        """The update s · B A of a layer of kind LORA, scale folded into B; for DoRA, the part inside the norm."""
        B, A = self.sites[site]["B"], self.sites[site]["A"]
        return LowRank(B.reshape(B.shape[0], -1) * self.scale_at(site), A.reshape(A.shape[0], -1))  # (m, r), (r, n)


def read_peft(directory: str | Path) -> dict[str, LowRank]:
    """The updates of a PEFT LoRA adapter, without a model: layer -> (B, A), scale folded in.

    Args:
        directory: a folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: damaged files, or an adapter whose update cannot be told without its base (DoRA, every other type).
    """
    adapter = read(Path(directory))
    if adapter.kind != "LORA" or adapter.magnitudes:
        what = "DoRA rescales the rows of the base" if adapter.magnitudes else f"it is of peft_type {adapter.kind}, not LORA"
        raise CheckpointError(f"{directory}: {what}, so its update cannot be read without the model; use from_peft(model, …)")
    return {site: adapter.factors(site) for site in adapter.sites}


def read(folder: Path, *, ignore: Sequence[str] = (), trainable: bool = False) -> PeftAdapter:
    """Reads and checks a folder.

    Args:
        folder: with the two files.
        ignore: fields of the config that the caller takes responsibility for.
        trainable: whether fields that act in training alone matter too.

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
    method = check_config(path, config, frozenset(ignore), trainable=trainable)
    fields = Fields(config, method.defaults, frozenset(ignore), trainable)
    sites, shared, whole = _sorted(folder, config, method, read_tensors(tensors_path))
    _unite(folder, method, sites, shared)
    letters = {site: _letters(folder, site, parts, method, fields) for site, parts in sites.items()}
    kind, metadata = str(config["peft_type"]), _metadata(tensors_path)
    return PeftAdapter(folder, config, kind, sites, letters, shared, whole, metadata, fields)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error


Sites = dict[str, dict[str, Tensor]]
Tensors = dict[str, Tensor]


def _sorted(
    folder: Path, config: Mapping[str, Any], method: PeftMethod, tensors: Mapping[str, Tensor]
) -> tuple[Sites, Tensors, Tensors]:
    """Gives every tensor its place: of a layer, of all layers, or of a module trained whole."""
    sites, shared, whole = Sites(), Tensors(), Tensors()
    unknown: list[str] = []
    parts = {**method.parts, BASE: "base"}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        ending = next((name for name in parts if path.endswith(f".{name}")), None)
        if key in method.shared:
            shared[method.shared[key]] = tensor
        elif path == key:
            unknown.append(key)
        elif ending is not None:
            sites.setdefault(path.removesuffix(f".{ending}"), {})[parts[ending]] = tensor
        elif _is_whole(path, config.get("modules_to_save") or ()):
            whole[path] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{folder}: {len(unknown)} of {len(tensors)} tensors belong to nothing that a {config['peft_type']} adapter has "
            f"({shorten(sorted(unknown))})"
        )
    if not sites:
        raise CheckpointError(f"{folder} holds {len(tensors)} tensors, none of which adapts a layer")
    return sites, shared, whole


def _is_whole(path: str, modules: Iterable[str]) -> bool:
    owner = path.rpartition(".")[0]
    return any(f".{module}." in f".{owner}." for module in modules)


def _unite(folder: Path, method: PeftMethod, sites: Sites, shared: Tensors) -> None:
    """Copies of a shared tensor beside the layers: all must be equal, and one is kept."""
    for part, name in method.repeated.items():
        copies = {site: parts.pop(part) for site, parts in sites.items() if part in parts}
        for site, copy in copies.items():
            if not torch.equal(copy, shared.setdefault(name, copy)):
                raise CheckpointError(
                    f"{folder}: {part} of {site} is not the {part} of the other layers, which all share one; the file was "
                    "put together from several adapters"
                )


def _letters(folder: Path, site: str, parts: Mapping[str, Tensor], method: PeftMethod, fields: Fields) -> dict[str, int]:
    """The sizes that the tensors of a layer tell, checked against each other and against the config."""
    forms, have = method.forms(fields), set(parts) - {"base"}
    known = set(method.parts.values())
    fitting = [form for form in forms if set(form) == have]
    if not fitting:
        needs = "; or ".join(", ".join(sorted(form)) for form in forms)
        raise CheckpointError(f"{folder}: {site} has {', '.join(sorted(have & known)) or 'nothing'} and needs {needs}")
    found = [letters_of(parts, form) for form in fitting]
    letters = next((letters for letters in found if isinstance(letters, dict)), None)
    if letters is None:
        raise CheckpointError(f"{folder}: {site}: {found[0]}")
    for letter, name in method.stated.items():
        stated = fields.at(name, site)
        if letter in letters and stated and letters[letter] != stated:
            what = "rank" if name == "r" else name
            raise CheckpointError(contradiction(folder, site, what, letters[letter], stated))
    return letters


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
