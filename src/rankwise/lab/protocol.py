"""What the lab needs of a task: a model, batches that a seed decides, and measures. `tasks.make_task` builds real ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from rankwise.core.targets import Where


class Task(Protocol):
    """A model and data to adapt it to.

    Attributes:
        head: modules trained whole beside the adapter (a new classification head); may be empty.
        where: layers to adapt, as for `rankwise.adapt_`.
        metric_name: key of the main measure in what `evaluate` returns.
        higher_is_better: whether a larger value of it is better.
    """

    head: Sequence[str]
    where: Where
    metric_name: str
    higher_is_better: bool

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
        """Loss on general text that the task is not about; None where the model has no such measure."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Model, data and settings in plain values; two tasks with the same description give the same numbers."""
        ...
