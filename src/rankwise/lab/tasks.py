"""A task: a model, data to adapt it to, batches that a seed decides, and measures. `make_task` builds one from names.

Three kinds, told by the data's columns: a causal language model (chat messages, prompt and answer, or plain text), text
classification and image classification. Batches depend on the seed alone, so every recipe sees the same ones.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankwise.core.errors import ArgumentError
from rankwise.core.targets import Where
from rankwise.lab.data import Data, Row, load_data
from rankwise.lab.models import CAUSAL, IMAGE, LoadedModel, initialize_, load_model

Batch = dict[str, torch.Tensor]
PROBE_SEED = 1_000_003  # the order of probe batches; no training seed uses it
EVAL_LIMIT = {CAUSAL: 200}  # rows evaluated unless the user says otherwise; generation is slow
DEFAULT_EVAL_LIMIT = 1000


class Task(ABC):
    """A model and data to adapt it to.

    Attributes:
        loaded, data: what it is made of.
        kind: one of `rankwise.lab.models.KINDS`.
        head: modules trained whole beside the adapter (a new classification head); may be empty.
        where: layers to adapt, as for `rankwise.adapt_`.
        metric_name: key of the main measure in what `evaluate` returns.
        higher_is_better: whether a larger value of it is better.
        retention_note: what `retention` measures, or why it gives None.
        device: where models and batches are.
    """

    metric_name: str
    higher_is_better: bool
    retention_note: str

    def __init__(self, loaded: LoadedModel, data: Data, *, seed: int, device: str, where: Where = "all-linear") -> None:
        self.loaded, self.data, self.seed, self.device = loaded, data, seed, device
        self.kind = loaded.kind
        self.head: Sequence[str] = loaded.fresh
        self.where: Where = where

    # -- the model -----------------------------------------------------------------------------------------------------

    def fresh_model(self, seed: int) -> nn.Module:
        """The untouched base on the task's device, in eval mode; what is new in it (a head) is drawn from the seed."""
        model = copy.deepcopy(self.loaded.model)
        initialize_(model, self.head, seed)
        return model.to(self.device).eval()

    # -- batches -------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def train_size(self) -> int:
        """How many examples there are to train on."""

    @abstractmethod
    def collate(self, indices: Sequence[int]) -> Batch:
        """Training examples as one batch on the CPU, labels included."""

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` batches in an order that the seed decides; more steps continue the same order, epoch after epoch."""
        order = self.order(seed)
        for _ in range(steps):
            yield self.to_device(self.collate([next(order) for _ in range(batch_size)]))

    def probe_batches(self, count: int, batch_size: int = 8) -> list[Batch]:
        """A few batches of training data, the same at every call: for starts that read statistics, and for counting costs."""
        return list(self.train_batches(batch_size, count, PROBE_SEED))

    def to_device(self, batch: Batch) -> Batch:
        """The batch where the model is."""
        return {key: value.to(self.device) for key, value in batch.items()}

    def order(self, seed: int) -> Iterator[int]:
        """Numbers of training examples, epoch after epoch, each epoch in an order of its own that the seed decides."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(self.train_size, generator=generator).tolist()

    # -- measures ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measures on held-out rows: `metric_name`, "loss" and others. Leaves the model's mode as it was."""

    @abstractmethod
    def retention(self, model: nn.Module) -> float | None:
        """How much of general ability is lost, lower is better; None where there is no measure (see `retention_note`)."""

    # -- telling -------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Model, data and settings in plain values; two tasks with the same description give the same numbers."""
        return {
            "kind": self.kind,
            "model": self.loaded.name,
            "model_numbers": sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            "model_hash": _model_hash(self.loaded.model, self.head),
            "data": self.data.name,
            "data_hash": _rows_hash([*self.data.train, *self.data.evaluation], self.data.columns.values()),
            "columns": dict(self.data.columns),
            "train_rows": len(self.data.train),
            "eval_rows": len(self.data.evaluation),
            "labels": list(self.data.labels),
            "seed": self.seed,
            "metric": self.metric_name,
            "retention": self.retention_note,
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.loaded.name} on {self.data.name}: {len(self.data.train)} rows to train on, "
            f"{len(self.data.evaluation)} to evaluate on, {self.metric_name})"
        )


def make_task(
    model_spec: str,
    data_spec: str,
    *,
    task: str | None = None,
    seed: int = 0,
    evaluation: str | None = None,
    columns: Mapping[str, str] | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    max_length: int | None = None,
    image_size: int | None = None,
    retention: str = "auto",
    device: str | None = None,
) -> Task:
    """Builds a task from the names of a model and data.

    Args:
        model_spec: see `rankwise.lab.models.load_model`.
        data_spec: see `rankwise.lab.data.load_data`; so are evaluation, columns and train_limit.
        task: "causal-lm", "text-classification" or "image-classification"; default: told by the data's columns.
        seed: of the choice of rows where a limit leaves some out.
        evaluation, columns, train_limit: as for `load_data`.
        eval_limit: rows to evaluate on; default 1000, or 200 for causal language models.
        max_length: tokens per row; default 128 for classification, 256 for language models.
        image_size: side in pixels; default: what the model was made for.
        retention: data with general text for `Task.retention`, "none", or "auto": the KJV if it is installed, else the source
            of Python's standard library. Image tasks use two photographs of scikit-learn.
        device: default: "cuda" if there is one, else "cpu".

    Raises:
        ModelError, DataError: something is missing or does not fit.
    """
    from rankwise.lab.causal import CausalTask
    from rankwise.lab.classify import ImageClassification, TextClassification

    data = load_data(
        data_spec, evaluation=evaluation, task=task, columns=columns, train_limit=train_limit, seed=seed,
        eval_limit=eval_limit or EVAL_LIMIT.get(task or "", DEFAULT_EVAL_LIMIT),
    )  # fmt: skip
    if eval_limit is None and task is None and data.kind in EVAL_LIMIT:
        kept = data.evaluation[: EVAL_LIMIT[data.kind]]
        data = Data(**{**data.__dict__, "evaluation": kept})
    if max_length is not None and (data.kind == IMAGE or max_length < 8):
        raise ArgumentError(f"max_length is a number of tokens, 8 or more, for tasks on text; got {max_length} for {data.kind}")
    loaded = load_model(model_spec, data.kind, data.labels, image_size=image_size)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if data.kind == CAUSAL:
        return CausalTask(loaded, data, seed=seed, device=place, max_length=max_length or 256, retention=retention)
    if data.kind == IMAGE:
        return ImageClassification(loaded, data, seed=seed, device=place, retention=retention)
    return TextClassification(loaded, data, seed=seed, device=place, max_length=max_length or 128, retention=retention)


def _rows_hash(rows: Sequence[Row], columns: Any) -> str:
    digest, used = hashlib.sha256(), sorted(columns)
    for row in rows:
        for column in used:
            value = row[column]
            digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _model_hash(model: nn.Module, head: Sequence[str]) -> str:
    """Of sums over every tensor but the fresh ones: cheap, and another checkpoint under the same name does not go unnoticed."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not any(name.startswith(f"{module}.") for module in head):
            digest.update(f"{name} {tuple(tensor.shape)} {float(tensor.double().sum()):.12e}".encode())
    return digest.hexdigest()[:16]
