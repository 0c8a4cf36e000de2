"""A task that trains in milliseconds: three Gaussian clouds that a rotation has moved since the base was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, WIDTH, INNER = 3, 8, 12


class TinyTask:
    """Classify points with a small network. `interrupt` is called with what is about to happen and may raise."""

    head = ("head",)
    where = "all-linear"
    metric_name = "accuracy"
    higher_is_better = True

    def __init__(self, *, rows: int = 256, noise: float = 1.5, poisoned_from: int | None = None) -> None:
        self.rows, self.noise, self.poisoned_from = rows, noise, poisoned_from
        self.interrupt: Callable[[str], None] = lambda what: None
        generator = torch.Generator().manual_seed(0)
        self.centers = torch.randn(CLASSES, WIDTH, generator=generator)  # (c, n)
        self.train, self.test = self._draw(rows, generator), self._draw(120, generator)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        return self.centers[labels] + self.noise * torch.randn(count, WIDTH, generator=generator), labels

    def fresh_model(self, seed: int) -> nn.Module:
        self.interrupt("model")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            body = {"first": nn.Linear(WIDTH, INNER), "second": nn.Linear(INNER, INNER)}
            torch.manual_seed(seed)
            layers = [body["first"], nn.Tanh(), nn.Dropout(0.1), body["second"], nn.Tanh(), nn.Linear(INNER, CLASSES)]
        names = ("first", "tanh", "dropout", "second", "tanh2", "head")
        model = nn.Sequential()
        for name, layer in zip(names, layers, strict=True):
            model.add_module(name, layer)
        return model

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            self.interrupt(f"batch {step} of {steps}")
            chosen = order[(torch.arange(batch_size) + step * batch_size) % self.rows]
            inputs = self.train[0][chosen]
            poisoned = self.poisoned_from is not None and step >= self.poisoned_from
            yield (inputs * float("nan") if poisoned else inputs), self.train[1][chosen]

    def probe_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.train_batches(16, count, 99)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        self.interrupt("evaluate")
        assert not model.training
        logits = model(self.test[0])
        hits = (logits.argmax(1) == self.test[1]).double().mean()
        return {"accuracy": float(hits), "loss": float(nn.functional.cross_entropy(logits, self.test[1]))}

    @torch.no_grad()
    def retention(self, model: nn.Module) -> float | None:
        return float(model(torch.ones(1, WIDTH)).square().mean())

    def describe(self) -> Mapping[str, Any]:
        return {"model": "tiny network", "data": "three clouds", "rows": self.rows}
