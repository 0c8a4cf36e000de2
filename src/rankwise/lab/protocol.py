"""What the lab needs of a task: a model, batches that a seed decides, and measures. `tasks.make_task` builds real ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from rankwise.core.targets import Where


class Task(Protocol):
    """A model and data to adapt it to."""

    @property
    def head(self) -> Sequence[str]:
        """Modules trained whole beside the adapter (a new classification head); may be empty."""
        ...

    @property
    def where(self) -> Where:
        """Layers to adapt, as for `rankwise.adapt_`."""
        ...

    @property
    def metric_name(self) -> str:
        """Key of the main measure in what `evaluate` returns."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the main measure is better."""
        ...

    def fresh_model(self, seed: int) -> nn.Module:
        """The untouched base; what is new in it (a head) is drawn from the seed."""
        ...

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterable[Any]:
        """`steps` batches in an order that the seed decides; more steps continue the same order."""
        ...

    def probe_batches(self, count: int) -> Iterable[Any]:
        """A few batches of training data, for starts that read statistics and for counting costs."""
        ...

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Measures on held-out data: `metric_name` and, where there is one, "loss"."""
        ...

    def retention(self, model: nn.Module) -> float | None:
        """What general ability costs, such as the loss on text that the task is not about; None without such a measure."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Model, data and settings in plain values; two tasks with the same description give the same numbers."""
        ...
