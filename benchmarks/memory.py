"""Full-rank training of the packaged language model: what each gradient projection keeps, needs at its peak, and takes.

Every method on the catalog's shelf of steps whose recipe trains a `weight` is a row. All linear layers are projected at a
quarter of the model's width; embedding and norms are trained beside them by what the recipe gives plain tensors. Bytes are
counted, times taken in turn with AdamW.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from benchmarks.clock import interleaved
from benchmarks.live import LiveBytes
from rankwise.core.compose import compose, make
from rankwise.core.handle import Handle
from rankwise.core.recipe import Recipe
from rankwise.lab.packaged import packaged_folder

MODEL, TOKENS = "packaged:smollm2", 128
REFERENCE = "AdamW"
# slug -> arguments that differ from the defaults beside the rank; {} leaves the rank alone too
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"conef": {}}
STEADY = frozenset({"online_subspace_descent"})  # its basis moves at every step; the interval is a rate


@dataclass(frozen=True)
class Variant:
    """One way to train all weights.

    Attributes:
        name: of the row.
        slug: in the catalog; "" for AdamW alone.
        make: (further arguments) -> recipe.
    """

    name: str
    slug: str
    make: Callable[..., Recipe]

    def accepts(self, argument: str) -> bool:
        """Whether the catalog's function has such an argument."""
        slug = self.slug or "adamw"
        return argument in inspect.signature(rankwise.catalog.entry(slug).make).parameters


@dataclass
class Row:
    """Costs of one method; bytes, and times relative to AdamW.

    Attributes:
        name, slug: of the variant.
        frozen: what lies underneath the trained weights.
        state: optimizer state of the linear layers, and of everything.
        state_8bit: the same with moments of 8 bits.
        peak: most live bytes of a step.
        peak_per_layer: where each layer moves during backward.
        peak_8bit: with 8-bit moments as well.
        step: time of an ordinary step.
        refresh: extra seconds of each kind of refresh step with the steps between two of them.
        seconds: of AdamW's step.
    """

    name: str
    slug: str
    frozen: int
    state: tuple[int, int]
    state_8bit: tuple[int, int] | None = None
    peak: int = 0
    peak_per_layer: int | None = None
    peak_8bit: int | None = None
    step: float = math.nan
    refresh: tuple[tuple[float, float], ...] = ()
    seconds: float = math.nan

    @property
    def amortized(self) -> float:
        """Time of a step relative to AdamW's, its share of the refreshes included."""
        return self.step + sum(extra / period for extra, period in self.refresh) / self.seconds


def variants(rank: int) -> list[Variant]:
    """AdamW, then every full-rank projection in the catalog."""
    found = [Variant(REFERENCE, "", lambda **more: compose("full", _adamw(more)) if more else compose("full"))]
    for slug in rankwise.catalog.names("step"):
        function = rankwise.catalog.entry(slug).make
        if "weight" not in function().roles:
            continue
        given = dict(ARGUMENTS.get(slug, {"rank": rank} if "rank" in inspect.signature(function).parameters else {}))
        said = ", ".join(f"{key}={value}" for key, value in given.items())
        found.append(Variant(f"{slug}({said})", slug, lambda slug=slug, given=given, **more: make(slug, **given, **more)))
    return found


def _adamw(arguments: Mapping[str, Any]) -> Recipe:
    return make("adamw", **arguments)


def eight_bits(variant: Variant) -> dict[str, Any] | None:
    """The arguments that give a variant 8-bit moments; None where it has none."""
    if "bits" not in inspect.signature(rankwise.catalog.entry("adamw").make).parameters:
        return None
    if not variant.slug:
        return {"bits": 8}
    return {"inner": make("adamw", bits=8)} if variant.accepts("inner") else None


def refreshes(variant: Variant) -> list[tuple[dict[str, Any], float]]:
    """Arguments under which every second step is a refresh of one kind, and how many steps lie between two of that kind."""
    if not variant.slug or variant.slug in STEADY:
        return []
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(rankwise.catalog.entry(variant.slug).make).parameters.items()
    }
    cadence = next((name for name in ("refresh", "interval") if isinstance(known.get(name), int)), None)
    if cadence is None:
        return []
    period, of = float(known[cadence]), known.get("recompute")
    if of is None:
        return [({cadence: 2}, period)]
    return [({cadence: 2, "recompute": 1}, period * of), ({cadence: 2, "recompute": 10**6}, period * of / (of - 1))]


class Training:
    """A copy of the model under one recipe, trained whole.

    Args:
        base: the model.
        recipe: what to train.
        per_layer: whether layers move during backward.
    """

    def __init__(self, base: nn.Module, recipe: Recipe, *, per_layer: bool = False) -> None:
        self.model: Any = copy.deepcopy(base)
        beside = [
            name
            for name, module in self.model.named_modules()
            if any(True for _ in module.parameters(recurse=False)) and not isinstance(module, nn.Linear)
        ]
        self.handle: Handle = rankwise.adapt_(self.model, recipe, train_also=beside)
        self.optimizer = self.handle.optimizer(lr=1e-5, per_layer=per_layer)
        vocabulary = int(self.model.config.vocab_size)
        ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        self.batch = {"input_ids": ids, "labels": ids}
        self.model.train()

    def step(self) -> None:
        """One step."""
        self.handle.backward(lambda: self.model(**self.batch).loss)
        self.optimizer.step()
        self.handle.after_step()
        self.optimizer.zero_grad()

    def state(self) -> tuple[int, int]:
        """Bytes of optimizer state: of the linear layers, and of everything."""
        beside = {id(tensor) for block in self.handle.plain_blocks().values() for tensor in block.values()}
        sizes = {
            tensor: sum(value.nbytes for value in kept.values() if isinstance(value, Tensor))
            for tensor, kept in self.optimizer.state.items()
        }
        return sum(size for tensor, size in sizes.items() if id(tensor) not in beside), sum(sizes.values())

    def measured(self) -> tuple[tuple[int, int], int]:
        """State, and the peak of live bytes over two steps: the first refreshes, the second finds all state there."""
        with LiveBytes([*self.model.parameters(), *self.model.buffers()]) as bytes_:
            self.step()
            self.step()
        return self.state(), bytes_.peak


def rows(*, rounds: int, layers: int | None = None, base: nn.Module | None = None) -> list[Row]:
    """All rows, AdamW's first.

    Args:
        rounds: steps of each method that are timed, in turn with AdamW's.
        layers: only the first so many layers of the model.
        base: another model, with a `config` like Llama's.
    """
    model = language_model(layers) if base is None else base
    config: Any = model.config
    every, found = variants(config.hidden_size // 4), []
    reference = Training(model, every[0].make())
    reference.step()
    for variant in every:
        print(f"  {variant.name}", file=sys.stderr, flush=True)
        row = counted(model, variant)
        time_(row, model, variant, reference, rounds)
        found.append(row)
    return found


def language_model(layers: int | None = None) -> nn.Module:
    """The packaged language model, or its first layers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(packaged_folder(MODEL), dtype=torch.float32, use_cache=False)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def counted(model: nn.Module, variant: Variant) -> Row:
    """The bytes of one row."""
    training = Training(model, variant.make())
    frozen = sum(target.parameter().nbytes for target in training.handle.targets.values())
    state, peak = training.measured()
    del training
    row = Row(variant.name, variant.slug, frozen, state, peak=peak)
    _, row.peak_per_layer = Training(model, variant.make(), per_layer=True).measured()
    small = eight_bits(variant)
    if small is not None:
        row.state_8bit, row.peak_8bit = Training(model, variant.make(**small), per_layer=True).measured()
    return row


def time_(row: Row, model: nn.Module, variant: Variant, reference: Training, rounds: int) -> None:
    """Puts the times into a row; `reference` has taken a step with AdamW before."""
    if not variant.slug:
        row.step, row.seconds = 1.0, min(_times(reference, rounds))
        return
    training = Training(model, variant.make())
    training.step()  # makes state and bases
    ratios = interleaved({REFERENCE: reference.step, "this": training.step}, REFERENCE, rounds=rounds, warm=1)
    row.step, row.seconds = ratios["this"].cpu, ratios[REFERENCE].milliseconds / 1e3
    del training
    gc.collect()
    row.refresh = tuple((_extra(Training(model, variant.make(**given))), period) for given, period in refreshes(variant))


def _extra(training: Training) -> float:
    """Seconds by which a refresh step is longer, where every second step is one."""
    times = _times(training, 4)
    return max(0.0, times[2] - statistics.median(times[1::2]))


def _times(training: Training, steps: int) -> list[float]:
    """CPU seconds of each of so many steps."""
    times = []
    for _ in range(steps):
        begin = time.process_time()
        training.step()
        times.append(time.process_time() - begin)
    return times
