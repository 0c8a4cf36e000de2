"""Tasks: a model and data to adapt it to, with deterministic batches and measures. What `rankwise train` and `compare` work on.

    make_task("packaged:minilm", "packaged:tweets")            text classification
    make_task("packaged:smollm2", "packaged:reasoning-gym/chain_sum")   causal language model, exact match
    make_task("packaged:dinov2-small", "packaged:fashion-mnist")        image classification

The base is loaded once; `fresh_model` copies it and draws what is new in it (a head) from the seed, so that every recipe starts
from the same numbers and meets the same batches.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import DataError
from rankwise.core.randomness import generator_for
from rankwise.core.targets import Where
from rankwise.lab.data import Data, Row, load_data
from rankwise.lab.general import Drift, general_images, general_text, language_loss
from rankwise.lab.language import Language
from rankwise.lab.models import CAUSAL_LM, IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, LoadedModel, load_model

Batch = dict[str, Tensor]


class Format(ABC):
    """Interface: how rows of one kind become batches, and how a model is measured on them."""

    metric_name: str
    higher_is_better = True

    @abstractmethod
    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as keyword arguments of the model, labels included."""

    @abstractmethod
    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        """The measures, `metric_name` and "loss" among them."""

    @abstractmethod
    def retention(self, model: nn.Module) -> float | None:
        """What the model still knows of general data."""

    @abstractmethod
    def general_name(self) -> str:
        """What retention is measured on."""


class Task:
    """See `rankwise.lab.protocol.Task`."""

    where: Where = "all-linear"

    def __init__(self, loaded: LoadedModel, data: Data, form: Format, settings: Mapping[str, Any]) -> None:
        self._loaded, self._data, self._form, self._settings = loaded, data, form, dict(settings)
        self.head: Sequence[str] = loaded.head
        self.metric_name, self.higher_is_better = form.metric_name, form.higher_is_better
        self.kind, self.tokenizer, self.labels = loaded.kind, loaded.tokenizer, data.labels

    def fresh_model(self, seed: int) -> nn.Module:
        """A copy of the untouched base; new modules are drawn from the seed."""
        model = copy.deepcopy(self._loaded.model)
        with torch.no_grad():
            for name in self.head:
                for key, parameter in model.get_submodule(name).named_parameters():
                    generator = generator_for(seed, "head", name, key)
                    std = getattr(model.config, "initializer_range", 0.02) if parameter.dim() > 1 else 0.0
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return model

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` batches; every pass over the rows has an order of its own, decided by the seed."""
        rows, order, passes = self._data.train, [], 0
        for _ in range(steps):
            while len(order) < batch_size:
                generator = generator_for(seed, "order", passes)
                order += torch.randperm(len(rows), generator=generator).tolist()
                passes += 1
            taken, order = order[:batch_size], order[batch_size:]
            yield self._form.batch([rows[index] for index in taken])

    def probe_batches(self, count: int) -> list[Batch]:
        """A few batches of training rows, the same for every recipe."""
        return list(self.train_batches(min(8, len(self._data.train)), count, seed=-1 & 0xFFFF))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures on the held-out rows."""
        with _evaluating(model):
            return self._form.evaluate(model, self._data.test)

    def retention(self, model: nn.Module) -> float | None:
        """Loss on general text (language models) or drift of the body's features (classifiers)."""
        with _evaluating(model):
            return self._form.retention(model)

    def describe(self) -> dict[str, Any]:
        """Model, data and settings in plain values."""
        return {
            "model": self._loaded.name,
            "data": self._data.name,
            "kind": self.kind,
            "train_rows": len(self._data.train),
            "test_rows": len(self._data.test),
            "retention_on": self._form.general_name(),
            **self._settings,
        }


class _evaluating:  # noqa: N801  (a with-block)
    """eval() for the length of a with-block."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)


class Classification(Format):
    """Text or images with one label each."""

    metric_name = "accuracy"

    def __init__(self, loaded: LoadedModel, labels: Sequence[str], length: int, image_size: int) -> None:
        self._index = {label: index for index, label in enumerate(labels)}
        self._tokenizer, self._length, self._size = loaded.tokenizer, length, image_size
        self._general, batches = self._general_batches()
        self._drift = Drift(loaded.model, batches)

    def _general_batches(self) -> tuple[str, list[Batch]]:
        if self._tokenizer is None:
            name, images = general_images(self._size)
            return name, [{"pixel_values": normalized(part)} for part in images.split(8)]
        name, passages = general_text()
        return name, [self._tokens(passages[start : start + 8]) for start in range(0, len(passages), 8)]

    def _tokens(self, texts: Sequence[str]) -> Batch:
        return dict(self._tokenizer(list(texts), return_tensors="pt", truncation=True, max_length=self._length, padding=True))

    def batch(self, rows: Sequence[Row]) -> Batch:
        labels = torch.tensor([self._index[str(row["label"])] for row in rows])
        if self._tokenizer is None:
            images = torch.stack([as_image(row["image"], self._size) for row in rows])
            return {"pixel_values": normalized(images), "labels": labels}
        return {**self._tokens([str(row["text"]) for row in rows]), "labels": labels}

    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

        if self._tokenizer is not None:  # rows of like length together: less padding, same numbers
            rows = sorted(rows, key=lambda row: len(str(row["text"])))
        scores, labels = [], []
        with torch.no_grad():
            for start in range(0, len(rows), 64):
                batch = self.batch(rows[start : start + 64])
                labels.append(batch.pop("labels"))
                scores.append(model(**batch).logits.float())
        logits, targets = torch.cat(scores), torch.cat(labels)
        classes = len(self._index)
        return {
            "loss": float(nn.functional.cross_entropy(logits, targets)),
            "accuracy": float(multiclass_accuracy(logits, targets, classes, average="micro")),
            "macro_f1": float(multiclass_f1_score(logits, targets, classes, average="macro")),
        }

    def retention(self, model: nn.Module) -> float | None:
        return self._drift(model)

    def general_name(self) -> str:
        return f"drift of features on {self._general}"


class Generation(Format):
    """A causal language model on chats, questions with answers, or plain text."""

    def __init__(self, loaded: LoadedModel, data: Data, length: int, new_tokens: int) -> None:
        self._language = Language(loaded.tokenizer, length, new_tokens, data.score)
        self._asks = "prompt" in data.train[0]
        self.metric_name = "exact_match" if self._asks else "loss"
        self.higher_is_better = self._asks
        self._general, self._passages = general_text()

    def batch(self, rows: Sequence[Row]) -> Batch:
        return self._language.batch(rows)

    def evaluate(self, model: nn.Module, rows: Sequence[Row]) -> dict[str, float]:
        measures = {"loss": self._language.loss(model, rows)}
        return measures | {"exact_match": self._language.exact_match(model, rows)} if self._asks else measures

    def retention(self, model: nn.Module) -> float | None:
        return language_loss(model, self._language.tokenizer, self._passages, self._language.length)

    def general_name(self) -> str:
        return f"loss on {self._general}"


def as_image(value: Any, size: int) -> Tensor:
    """A file name, PIL image or array as (3, size, size) in [0, 1]."""
    import numpy
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, str):
        try:
            value = Image.open(value)
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{value} cannot be read as an image: {error}") from error
    if isinstance(value, Image.Image):
        value = numpy.asarray(value.convert("RGB"))
    pixels = torch.as_tensor(numpy.array(value)).float() / 255
    pixels = pixels.expand(3, *pixels.shape) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    resized = nn.functional.interpolate(pixels[None], size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def normalized(images: Tensor) -> Tensor:
    """Images in [0, 1] by the mean and spread of ImageNet, as pretrained vision models expect them."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


def make_task(
    model: str,
    data: str,
    *,
    kind: str | None = None,
    test_data: str | None = None,
    text: str | None = None,
    label: str | None = None,
    length: int = 128,
    image_size: int = 56,
    new_tokens: int = 16,
    train_limit: int | None = None,
    test_limit: int | None = 1000,
) -> Task:
    """Builds a task from the names of a model and of data.

    Args:
        model: see `rankwise.lab.models.load_model`.
        data: see `rankwise.lab.data.load_data`.
        kind: "causal-lm", "text-classification" or "image-classification"; default: what the columns fit.
        test_data: a second file to evaluate on.
        text, label: column names.
        length: most tokens of a row.
        image_size: pixels of an image's side.
        new_tokens: most tokens of an answer.
        train_limit, test_limit: most rows; the first ones of the fixed order.

    Raises:
        DataError, ModelError: see `load_data` and `load_model`.
    """
    loaded_data = load_data(data, test=test_data, text=text, label=label)
    if kind is not None and kind != loaded_data.kind:
        if kind == CAUSAL_LM and loaded_data.kind == TEXT_CLASSIFICATION:
            loaded_data.kind, loaded_data.labels = CAUSAL_LM, None
        else:
            raise DataError(
                f"{data} fits the task {loaded_data.kind}, not {kind}; its columns are {', '.join(loaded_data.train[0])}"
            )
    loaded_data.train = loaded_data.train[:train_limit]
    loaded_data.test = loaded_data.test[:test_limit]
    loaded = load_model(model, loaded_data.kind, loaded_data.labels)
    settings: dict[str, Any] = {"length": length}
    if loaded_data.kind == CAUSAL_LM:
        form: Format = Generation(loaded, loaded_data, length, new_tokens)
    else:
        form = Classification(loaded, loaded_data.labels or (), length, image_size)
        settings = {"image_size": image_size} if loaded_data.kind == IMAGE_CLASSIFICATION else settings
    return Task(loaded, loaded_data, form, settings)
