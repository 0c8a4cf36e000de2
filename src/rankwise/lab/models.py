"""Loading a model by what the user calls it: a folder, a hub name, a GGUF file, or a packaged model's short name.

Tensors that the checkpoint lacks (a classification head) are named in `LoadedModel.fresh`; they are the ones to train whole,
and `initialize_` draws them from a private seeded generator, so that the same seed gives the same initial model.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.core.errors import ModelError, did_you_mean, shorten
from rankwise.lab.packaged import PREFIX, cached, convert_gguf, packaged_folder, packaged_model

CAUSAL, TEXT, IMAGE = "causal-lm", "text-classification", "image-classification"
KINDS = (CAUSAL, TEXT, IMAGE)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to adapt.

    Attributes:
        model: in float32 on the CPU, in eval mode.
        processor: the tokenizer, or for images an `ImageProcessing`.
        name: as the user called it.
        kind: one of `KINDS`.
        fresh: modules that the checkpoint does not have, such as a new classification head.
        source: the folder or hub name it was read from.
    """

    model: nn.Module
    processor: Any
    name: str
    kind: str
    fresh: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class ImageProcessing:
    """What a vision model expects: side in pixels, and mean and deviation per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_model(spec: str, task: str, labels: Sequence[str] | None = None, *, image_size: int | None = None) -> LoadedModel:
    """Loads a model for a task.

    Args:
        spec: a transformers folder, a hub name, a .gguf file, or packaged:NAME.
        task: one of `KINDS`.
        labels: names of the classes, in order, for the two classification tasks.
        image_size: side in pixels for vision models; default: what the model was made for.

    Raises:
        ModelError: not found, not installed, damaged, or not a model for this task.
    """
    if task not in KINDS:
        raise ModelError(f"no task {task!r}. {did_you_mean(task, KINDS)}")
    source = resolve(spec)
    arguments: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if task != CAUSAL:
        if not labels:
            raise ModelError(f"{spec}: a {task} model needs the names of its classes")
        arguments |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a head for other classes is replaced, and reported as fresh below
        }
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        processor: Any = _image_processing(spec, source, image_size) if task == IMAGE else _tokenizer(spec, source)
        try:
            model, info = _class_for(task).from_pretrained(source, **arguments)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{spec} cannot be loaded as a {task} model: {_first_lines(error)}") from error
    missing = sorted({*info["missing_keys"], *(str(entry[0]) for entry in info["mismatched_keys"])})
    fresh = _fresh_modules(model, missing, spec, task)
    if task == TEXT and processor.pad_token_id is not None:
        model.config.pad_token_id = processor.pad_token_id  # decoders find the last token of a row by it
    return LoadedModel(model=model.eval(), processor=processor, name=spec, kind=task, fresh=fresh, source=source)


def resolve(spec: str) -> str:
    """The transformers folder or hub name behind a user's name for a model, converted if need be.

    Raises:
        ModelError: nothing is there, or what is there is no model.
    """
    if spec.startswith(PREFIX):
        return str(packaged_folder(spec))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return str(cached(f"gguf-{path.stem}-{key}", lambda into: convert_gguf(path, into)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            held = sorted(entry.name for entry in path.iterdir())
            adapter = {"adapter.json", "adapter_config.json"} & set(held)
            hint = " It is an adapter: pass the model it was trained on." if adapter else ""
            raise ModelError(
                f"{path} has no config.json, so it is no transformers model; it holds {shorten(held) or 'nothing'}.{hint}"
            )
        return str(path)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ModelError(f"{spec} is no folder of a transformers model, no .gguf file and no hub name")
    return spec


def initialize_(model: nn.Module, fresh: Sequence[str], seed: int) -> None:
    """Draws the fresh modules: matrices normal with the model's own spread, the rest zero. Other tensors stay."""
    spread = float(getattr(getattr(model, "config", None), "initializer_range", None) or 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in fresh:
            for parameter in model.get_submodule(name).parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
                else:
                    parameter.zero_()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' loading bars and reports off the terminal; what they would tell is checked and raised here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _class_for(task: str) -> Any:
    import transformers

    return {
        CAUSAL: transformers.AutoModelForCausalLM,
        TEXT: transformers.AutoModelForSequenceClassification,
        IMAGE: transformers.AutoModelForImageClassification,
    }[task]


def _tokenizer(spec: str, source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{spec}: no tokenizer can be loaded: {_first_lines(error)}{_hub_hint(source)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{spec}: the tokenizer has neither a padding nor an end token, so rows cannot be put into one batch")
    return tokenizer


def _image_processing(spec: str, source: str, size: int | None) -> ImageProcessing:
    """Read from the model's own files; no image library is needed for resizing and scaling."""
    import json

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{spec}: {_first_lines(error)}{_hub_hint(source)}") from error
    file = Path(source) / "preprocessor_config.json"
    held = json.loads(file.read_text()) if file.is_file() else {}
    packaged = packaged_model(spec).image_size if spec.startswith(PREFIX) else None
    side = size or packaged or getattr(config, "image_size", None) or 224
    side = side if isinstance(side, int) else int(side[0])
    patch = getattr(config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else 1
    if side < patch or side % patch:
        raise ModelError(
            f"{spec} cuts images into patches of {patch} pixels, so the image size is a multiple of it, not {side}"
        )
    mean, std = held.get("image_mean", [0.485, 0.456, 0.406]), held.get("image_std", [0.229, 0.224, 0.225])
    return ImageProcessing(side, tuple(mean), tuple(std))


def _fresh_modules(model: nn.Module, missing: Sequence[str], spec: str, task: str) -> tuple[str, ...]:
    """The modules that hold the missing tensors. A body with holes is refused: it would train on random numbers."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    holes = [key for key in missing if task == CAUSAL or (key.startswith(body) and ".pooler." not in f".{key}")]
    if holes:
        raise ModelError(
            f"{spec}: the checkpoint lacks {len(holes)} tensors of a {type(model).__name__} ({shorten(holes)}); "
            "it is another kind of model, or damaged"
        )
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))


def _first_lines(error: Exception, most: int = 2) -> str:
    return " ".join(str(error).strip().splitlines()[:most])


def _hub_hint(source: str) -> str:
    if Path(source).is_dir():
        return ""
    return f" ({source!r} is taken as a hub name, since no such folder exists here; packaged models are written packaged:NAME)"
