"""Text and image classification: a fresh head on a pretrained encoder; loss, accuracy and macro F1."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import DataError
from rankwise.lab.data import Data, Row, label_of
from rankwise.lab.general import FeatureDrift, general_text, photographs
from rankwise.lab.models import ImageProcessing, LoadedModel
from rankwise.lab.tasks import Batch, Task

EVAL_BATCH = 64


class Classification(Task):
    """What text and image classification share."""

    metric_name = "accuracy"
    higher_is_better = True

    def __init__(self, loaded: LoadedModel, data: Data, *, seed: int, device: str) -> None:
        super().__init__(loaded, data, seed=seed, device=device)
        self.numbers = {label: index for index, label in enumerate(data.labels)}
        self._drift = FeatureDrift(lambda: self.fresh_model(0), self._general)

    @abstractmethod
    def inputs(self, rows: Sequence[Row]) -> Batch:
        """Rows as the model's inputs, without labels."""

    @abstractmethod
    def general_batches(self) -> list[Batch]:
        """General inputs for the drift; empty where there are none."""

    @abstractmethod
    def size_of(self, row: Row) -> int:
        """How long a row is; rows of like length are evaluated together."""

    @property
    def train_size(self) -> int:
        """How many rows there are to train on."""
        return len(self.data.train)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as inputs and labels."""
        column = self.data.columns["label"]
        labels = torch.tensor([self.numbers[label_of(row, column)] for row in rows])  # (rows,)
        return {**self.inputs(rows), "labels": labels}

    def collate(self, indices: Sequence[int]) -> Batch:
        """Training rows as one batch on the CPU."""
        return self.batch([self.data.train[index] for index in indices])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cross entropy, accuracy and macro F1 on the held-out rows."""
        from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

        training = model.training
        model.eval()
        rows = sorted(self.data.evaluation, key=self.size_of)
        scores, labels = [], []
        for begin in range(0, len(rows), EVAL_BATCH):
            batch = self.to_device(self.batch(rows[begin : begin + EVAL_BATCH]))
            labels.append(batch.pop("labels"))
            scores.append(model(**batch).logits.float())
        model.train(training)
        logits, truth = torch.cat(scores), torch.cat(labels)  # (rows, classes), (rows,)
        count = len(self.data.labels)
        return {
            "loss": float(nn.functional.cross_entropy(logits, truth)),
            "accuracy": float(multiclass_accuracy(logits, truth, num_classes=count, average="micro")),
            "macro_f1": float(multiclass_f1_score(logits, truth, num_classes=count, average="macro")),
        }

    def retention(self, model: nn.Module) -> float | None:
        """Drift of the encoder's features on general inputs; 0 for the base."""
        return self._drift.of(model) if self.general_batches() else None

    def _general(self) -> list[Batch]:
        return [self.to_device(batch) for batch in self.general_batches()]


class TextClassification(Classification):
    """Texts with a label."""

    def __init__(
        self, loaded: LoadedModel, data: Data, *, seed: int, device: str, max_length: int, retention: str = "auto"
    ) -> None:
        super().__init__(loaded, data, seed=seed, device=device)
        self.max_length = max_length
        self.general, name = general_text(retention, data.name)
        self.retention_note = (
            f"drift of the encoder's features on {len(self.general)} texts of {name}" if self.general else name
        )

    def _tokens(self, texts: Sequence[str]) -> Batch:
        found = self.loaded.processor(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return dict(found)

    def inputs(self, rows: Sequence[Row]) -> Batch:
        """Token numbers and mask, padded to the longest row."""
        return self._tokens([row[self.data.columns["text"]] for row in rows])

    def general_batches(self) -> list[Batch]:
        """Beginnings of general texts."""
        return [self._tokens(self.general[begin : begin + 16]) for begin in range(0, len(self.general), 16)]

    def size_of(self, row: Row) -> int:
        """Characters."""
        return len(row[self.data.columns["text"]])

    def describe(self) -> dict[str, Any]:
        """As for every task, and the length of a row."""
        return {**super().describe(), "max_length": self.max_length}


class ImageClassification(Classification):
    """Images with a label: arrays (height, width) or (height, width, 3) of bytes, pictures of Pillow, or paths of files."""

    def __init__(self, loaded: LoadedModel, data: Data, *, seed: int, device: str, retention: str = "auto") -> None:
        super().__init__(loaded, data, seed=seed, device=device)
        self.processing: ImageProcessing = loaded.processor
        self.off = retention == "none"
        self.retention_note = "switched off" if self.off else "drift of the encoder's features on cut-outs of two photographs"

    def inputs(self, rows: Sequence[Row]) -> Batch:
        """pixel_values (rows, 3, size, size), scaled as the model expects."""
        side = (self.processing.size, self.processing.size)
        images = [_pixels(row[self.data.columns["image"]]) for row in rows]
        if len({image.shape for image in images}) == 1:
            resized = nn.functional.interpolate(torch.stack(images), size=side, mode="bilinear", antialias=True)
        else:
            parts = [nn.functional.interpolate(image[None], size=side, mode="bilinear", antialias=True) for image in images]
            resized = torch.cat(parts)
        return {"pixel_values": self._scaled(resized)}

    def _scaled(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.processing.mean, self.processing.std))
        return (pixels / 255.0 - mean) / std

    def general_batches(self) -> list[Batch]:
        """Cut-outs of photographs."""
        return [] if self.off else [{"pixel_values": self._scaled(photographs(self.processing.size).float())}]

    def size_of(self, row: Row) -> int:
        """All are resized to the same size."""
        return 0

    def describe(self) -> dict[str, Any]:
        """As for every task, and the size of an image."""
        return {**super().describe(), "image_size": self.processing.size}


def _pixels(image: Any) -> Tensor:
    """(3, height, width) float32 in 0..255."""
    import numpy as np

    if isinstance(image, str | Path):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(image) as picture:
                image = picture.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"the image {image} cannot be read: {error}") from error
    elif hasattr(image, "convert"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise DataError(f"an image is (height, width) or (height, width, 3) bytes; got {array.shape} of {array.dtype}")
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float()
