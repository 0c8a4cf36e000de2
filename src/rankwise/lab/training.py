"""One training run of a comparison: a fresh base, a recipe, a learning rate, a seed and a number of steps.

Everything that could differ between recipes for other reasons than the recipe is fixed by the seed: the head, the batches and
their order, and the model's own dropout. The rate rises over the first 6 % of the steps and then falls linearly to zero. A
loss or a gradient that is not finite, or a loss a thousand times the first, ends the run with the outcome "diverged", which is
a result and no crash.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from rankwise.core.adapt import adapt_, collect
from rankwise.core.errors import TrainingError
from rankwise.core.handle import Handle
from rankwise.core.piece import Piece
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import LayerStatistics, Statistic, default_loss
from rankwise.lab.protocol import Task

WARMUP = 0.06
CLOCKS = frozenset({"total_steps", "warmup_steps", "final_steps", "decay_steps", "warmup"})
EXPLODED = 1000.0  # a loss this many times the first one counts as diverged


@dataclass
class Trained:
    """What a run left behind.

    Attributes:
        handle: the adapter, on its model.
        curve: training loss of each step taken.
        seconds: of each step taken.
        start_seconds: spent on statistics for the start.
        failure: why it ended early, or "".
    """

    handle: Handle
    curve: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start_seconds: float = 0.0
    failure: str = ""

    @property
    def seconds_per_step(self) -> float | None:
        """Median, the first two steps left out where there are more."""
        kept = self.seconds[2:] or self.seconds
        return median(kept) if kept else None


class Starts:
    """Statistics for starts that read data, collected once per seed and shared by the runs of that seed.

    Args:
        task: gives the base and the probe batches.
        probes: how many batches.
    """

    def __init__(self, task: Task, probes: int) -> None:
        self.task, self.probes = task, probes
        self._key: tuple[int, frozenset[Statistic]] | None = None
        self._kept: tuple[Mapping[str, LayerStatistics], float] | None = None

    def of(self, model: nn.Module, recipe: Recipe, seed: int) -> tuple[Mapping[str, LayerStatistics] | None, float]:
        """Statistics of the untouched model and the seconds they took; None where the recipe needs none."""
        if not recipe.needs:
            return None, 0.0
        key = (seed, recipe.needs)
        if self._kept is None or self._key != key:
            begin = time.perf_counter()
            batches = self.task.probe_batches(self.probes)
            with seeded(seed):
                statistics = collect(model, batches, recipe.needs, self.task.where, train_also=tuple(self.task.head))
            self._key, self._kept = key, (statistics, time.perf_counter() - begin)
        return self._kept


def train(
    task: Task,
    recipe: Recipe,
    *,
    learning_rate: float,
    seed: int,
    steps: int,
    batch_size: int,
    starts: Starts,
    whole: int | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """Adapts a fresh base and trains it.

    Args:
        task: model and data.
        recipe: what to train.
        learning_rate: at its highest.
        seed: of head, batches, dropout and adapter.
        steps: how many.
        batch_size: rows per step.
        starts: statistics for the recipe's start.
        whole: steps of the run that this one is a short version of; default: it is the whole one.
        on_step: called after each step with its number (from 0) and its loss.
    """
    model = task.fresh_model(seed)
    statistics, start_seconds = starts.of(model, recipe, seed)
    recipe = with_horizon(recipe, steps, whole or steps)
    handle = adapt_(model, recipe, task.where, statistics, seed=seed, train_also=tuple(task.head))
    optimizer = handle.optimizer(lr=learning_rate)
    run = Trained(handle, start_seconds=start_seconds)
    model.train()
    with seeded(seed):
        for step, batch in enumerate(task.train_batches(batch_size, steps, seed)):
            if step == steps:
                break
            begin = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate_at(step, steps)
            try:
                value = float(handle.backward(lambda batch=batch: default_loss(model, batch)))
                if exploded(value, run.curve):
                    run.failure = f"the loss of step {step} is {value:.4g}"
                    break
                run.curve.append(value)
                optimizer.step()
                handle.after_step()
            except (TrainingError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
                if _all_finite(handle):
                    raise  # not a matter of numbers: a call was forgotten, or a method is used wrongly
                run.failure = str(error)
                break
            optimizer.zero_grad()
            run.seconds.append(time.perf_counter() - begin)
            on_step(step, value)
        else:
            step = len(run.curve)
            if step < steps:
                raise TrainingError(f"the task gave {step} of {steps} batches; this is a bug in the task")
    if not run.failure and not _all_finite(handle):
        run.failure = "a trained number is not finite after the last step"
    return run


def exploded(value: float, curve: Sequence[float]) -> bool:
    """Whether a loss is not finite, or out of all proportion to the first one."""
    return not math.isfinite(value) or bool(curve and value > EXPLODED * max(curve[0], 1.0))


def rate_at(step: int, steps: int) -> float:
    """The factor on the learning rate: up over the first 6 % of the steps, then linearly down to zero."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm + 1)


def with_horizon(recipe: Recipe, steps: int, whole: int) -> Recipe:
    """The recipe with its clocks (warm-ups, horizons) shortened in proportion, for a run of `steps` instead of `whole` steps.

    So a short run of the sweep goes through the same phases as the run whose learning rate it looks for.
    """
    if steps == whole:
        return recipe

    def shortened(part: Piece | None) -> Piece | None:
        if part is None or not CLOCKS & set(part.arguments):
            return part
        clocks = {name: part.arguments[name] for name in CLOCKS & set(part.arguments) if part.arguments[name]}
        rounding = {name: math.ceil if name in ("total_steps", "decay_steps") else math.floor for name in clocks}
        return Piece(
            part.shelf,
            part.name,
            {**part.arguments, **{name: rounding[name](count * steps / whole) for name, count in clocks.items()}},
        )

    changed = {shelf: shortened(getattr(recipe, shelf)) for shelf in ("perturbation", "schedule", "procedure")}
    chain = tuple(part for step in recipe.step if (part := shortened(step)) is not None)
    return Recipe(**{**recipe.__dict__, **changed, "step": chain})


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Mean loss over batches, without dropout; infinity where it is not finite."""
    model.eval()
    values = [float(default_loss(model, batch)) for batch in batches]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else math.inf


def _all_finite(handle: Handle) -> bool:
    tensors = [tensor for block in {**handle.blocks(), **handle.plain_blocks()}.values() for tensor in block.values()]
    return all(
        bool(torch.isfinite(tensor).all()) and (tensor.grad is None or bool(torch.isfinite(tensor.grad).all()))
        for tensor in tensors
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generator, from which a model's own dropout draws, and puts it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
