"""What the experiments share: the learning rate, the training loop, what is counted in it, and rows kept on disk.

A row is one method's run. It is written when it is finished, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.checkpoint import write_atomically
from rankwise.core.errors import ArgumentError, TrainingError, did_you_mean
from rankwise.core.handle import Handle
from rankwise.core.optimizer import BlockOptimizer
from rankwise.lab.training import exploded
from rankwise.procedures.relora import relora_schedule

Settings = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of a table.

    Attributes:
        name: what the table calls it.
        recipe: as `rankwise.compose` reads it; {rank} and {interval} stand for what the experiment's size asks for.
        rate: highest learning rate of the adapted layers.
        rest: of everything else that is trained; None: the experiment's.
        jagged: whether the rate begins again at every restart, {interval} steps apart.
        warm: share of the steps that train whole weights with AdamW first.
        seed: of weights, batches and adapter.
        width: factor on the model's width, for smaller models without an adapter.
    """

    name: str
    recipe: str
    rate: float
    rest: float | None = None
    jagged: bool = False
    warm: float = 0.0
    seed: int = 0
    width: float = 1.0

    def text(self, **sizes: int) -> str:
        """The recipe with its sizes filled in."""
        return self.recipe.format(**sizes)


@dataclass
class Run:
    """What a training run left behind.

    Attributes:
        losses: of each step.
        seconds: CPU time of each step.
        state_bytes: most that the optimizer kept for adapted layers at the end of a step.
        rest_bytes: the same for what is trained beside them.
        trained: numbers trained in adapted layers, at the end.
        failure: why it ended early, or "".
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    rest_bytes: int = 0
    trained: int = 0
    failure: str = ""

    def to_json(self) -> Row:
        """A JSON-ready mapping; seconds as their median, after the first two, and their sum."""
        settled = self.seconds[2:] or self.seconds
        kept = {key: value for key, value in asdict(self).items() if key != "seconds"}
        return kept | {"seconds_per_step": median(settled) if settled else math.nan, "seconds": sum(self.seconds)}


def factors(steps: int, *, interval: int | None = None) -> Callable[[int], float]:
    """The factor on the rate at each step: up over a tenth of the steps, then as a cosine down to a tenth.

    Args:
        steps: of the run.
        interval: begin again from 0 at every multiple of so many steps, as ReLoRA does.
    """
    cycle = interval or steps + 1
    curve = relora_schedule(steps + 1, min(steps // 10, cycle), cycle, min(cycle - 1, cycle // 6) if interval else 0)
    return (lambda step: curve(step)) if interval else (lambda step: curve(step + 1))


def optimizer_of(handle: Handle, rate: float, rest: float) -> BlockOptimizer:
    """The recipe's optimizer, with a rate of its own for what is trained beside the adapted layers."""
    optimizer = handle.optimizer(lr=rate)
    group = optimizer.param_groups[0]
    named = list(zip(group["param_names"], group["params"], strict=True))
    beside = [(name, tensor) for name, tensor in named if name in handle.auxiliary]
    inside = [(name, tensor) for name, tensor in named if name not in handle.auxiliary]
    if inside and beside:
        group["param_names"], group["params"] = [list(part) for part in zip(*inside, strict=True)]
        optimizer.add_param_group({"params": beside, "lr": rest})
    return optimizer


def train(
    handle: Handle,
    loss_at: Callable[[int], Tensor],
    steps: Sequence[int],
    *,
    rate: float,
    rest: float,
    factor: Callable[[int], float],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Run:
    """Trains a handle for the given step numbers.

    Args:
        handle: what `adapt_` gave.
        loss_at: the loss of a step's batch; called again for the same step by methods of two passes.
        steps: numbers of the steps to take.
        rate: highest learning rate of adapted layers.
        rest: of everything else that is trained.
        factor: on both, by the step's number.
        on_step: called after each step with its number and loss.
    """
    optimizer = optimizer_of(handle, rate, rest)
    highest = [float(group["lr"]) for group in optimizer.param_groups]
    run = Run()
    for step in steps:
        begin = time.process_time()
        for group, peak in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = peak * factor(step)
        try:
            value = take_step(handle, optimizer, lambda step=step: loss_at(step))
        except (TrainingError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
            run.failure = str(error)
            break
        run.seconds.append(time.process_time() - begin)
        if exploded(value, run.losses):
            run.failure = f"the loss of step {step} is {value:.4g}"
            break
        run.losses.append(value)
        inside, beside = state_bytes(handle, optimizer)
        run.state_bytes, run.rest_bytes = max(run.state_bytes, inside), max(run.rest_bytes, beside)
        on_step(step, value)
    run.trained = handle.trained_numbers
    return run


def take_step(handle: Handle, optimizer: BlockOptimizer, closure: Callable[[], Tensor]) -> float:
    """One step of the loop that every recipe can be trained with; gives the loss."""
    loss = handle.backward(closure)
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()
    return float(loss)


def state_bytes(handle: Handle, optimizer: BlockOptimizer) -> tuple[int, int]:
    """Bytes that the optimizer keeps for adapted layers, and for what is trained beside them."""
    beside = {id(tensor) for block in handle.plain_blocks().values() for tensor in block.values()}
    sums = [0, 0]
    for tensor, kept in optimizer.state.items():
        sums[id(tensor) in beside] += sum(value.nbytes for value in kept.values() if isinstance(value, Tensor))
    return sums[0], sums[1]


def model_bytes(model: nn.Module) -> int:
    """Bytes of everything that the model holds, shared tensors once: base, adapters and what they keep."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values())


@torch.no_grad()
def absorb_(handle: Handle) -> None:
    """Writes what was trained into the weights and takes the adapter off."""
    updates = {site: handle.update_of(site).dense() for site in handle.targets}
    handle.detach_()
    for site, update in updates.items():
        target = handle.targets[site]
        target.parameter().add_(target.layout.from_matrix(update, target.parameter()))


class Rows:
    """Finished rows in a folder, one JSON file each.

    Args:
        folder: where they are kept.
        settings: of the experiment; rows made under others are not taken.
        fresh: run everything again.
    """

    def __init__(self, folder: Path, settings: Settings, *, fresh: bool = False) -> None:
        self.folder, self.settings, self.fresh = folder, dict(settings), fresh

    def row(self, method: Method, work: Callable[[], Row]) -> Row:
        """The finished row of a method; does the work and keeps what it gives where there is none."""
        key = {"method": asdict(method), "settings": self.settings, "rankwise": rankwise.__version__}
        said = json.dumps(key, sort_keys=True)
        slug = "".join(letter if letter.isalnum() else "-" for letter in method.name.lower())
        file = self.folder / f"{slug}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.json"
        if file.is_file() and not self.fresh:
            return json.loads(file.read_text(encoding="utf-8"))["row"]
        row = work()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**key, "row": row}, indent=1))
        return row


def chosen(methods: Sequence[Method], wanted: Sequence[str] | None) -> tuple[list[Method], list[str]]:
    """The methods asked for by name (default: all), and the names of those that this version's catalog does not have.

    Raises:
        ArgumentError: an unknown name, or one whose recipe the catalog does not have.
    """
    known = {method.name: method for method in methods}
    for name in wanted or ():
        if name not in known:
            raise ArgumentError(f"no method {name!r} in this table. {did_you_mean(name, known)}")
    asked = [known[name] for name in wanted] if wanted else list(methods)
    slugs = set(rankwise.catalog.names())
    missing = [one.name for one in asked if not {term.split("(")[0].strip() for term in one.recipe.split(" + ")} <= slugs]
    if wanted and missing:
        raise ArgumentError(f"this version's catalog does not have the recipe of {', '.join(missing)}")
    return [method for method in asked if method.name not in missing], missing
