"""`rankwise train`: one recipe on one task, on transformers' Trainer and accelerate, so that it can be stopped and continued.

Batches, their order, the warm-up and the decay of the learning rate are those of a comparison's final runs: a rate found by
`rankwise compare` means the same here. The folder holds `adapter/`, `run.json` (what was asked), `result.json` (what came
out, written last) and, until then, two lean checkpoints.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rankwise.core.adapt import adapt_, problems
from rankwise.core.checkpoint import trained_tensors
from rankwise.core.compose import compose
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.handle import Handle
from rankwise.core.statistics import Statistic
from rankwise.lab import runs, sweep
from rankwise.lab.models import quiet_transformers
from rankwise.lab.tasks import Task
from rankwise.lab.terminal import Progress
from rankwise.lab.training import Starts, rate_at, seeded


class Stopped(KeyboardInterrupt):
    """Ctrl-C; the text says what is kept and how to go on."""


def train_run(
    task: Task,
    recipe: str,
    *,
    out: str | Path,
    steps: int = 200,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float | None = None,
    seed: int = 0,
    where: str | Sequence[str] | None = None,
    save_every: int | None = None,
    probes: int = 8,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates and saves; the same call goes on where the last one stopped.

    Args:
        task: from `rankwise.lab.tasks.make_task`.
        recipe: text such as "lora(rank=8)" or "dora + pissa".
        out: folder of the run. A finished run is not trained again, its result is returned.
        steps: optimizer steps.
        batch_size: rows per step.
        accumulate: parts that a step's rows are cut into, to save memory.
        learning_rate: at its highest; default: the middle of what a comparison tries for this recipe.
        seed: of head, batches, dropout and adapter.
        where: layers to adapt; default: the task's.
        save_every: steps between checkpoints; default: a tenth of all steps, at most 100.
        probes: batches for starts that read statistics.
        quiet: no progress bar.

    Returns:
        What stands in result.json.

    Raises:
        ArgumentError: the folder holds another run, or a number makes no sense.
        RecipeError: the recipe is illegal on this model.
        TrainingError: the loss or a gradient is not finite; the adapter of the last good step is in <out>/last_good.
        Stopped: Ctrl-C; a checkpoint was written.
    """
    if steps < 1 or batch_size < 1 or accumulate < 1 or batch_size % accumulate:
        raise ArgumentError(
            f"steps, batch_size and accumulate are positive, and accumulate divides batch_size; got {steps}, {batch_size} "
            f"and {accumulate}"
        )
    composed, folder = compose(recipe), Path(out)
    rate = sweep.prior(composed, steps) if learning_rate is None else learning_rate
    if not 0 < rate < float("inf"):
        raise ArgumentError(f"the learning rate is a positive number, not {rate}")
    if where is not None:
        task.where = where
    part = composed.perturbation
    if accumulate > 1 and part is not None and part.factory.forward_only:  # type: ignore[attr-defined]
        raise ArgumentError(f"{part.name} needs the whole batch in one evaluation; use accumulate=1")
    settings = {
        **task.describe(), "recipe": composed.to_json(), "steps": steps, "batch_size": batch_size,
        "accumulate": accumulate, "learning_rate": rate, "run_seed": seed, "where": task.where, "probes": probes,
    }  # fmt: skip
    model = task.fresh_model(seed)
    collected = frozenset(Statistic) if composed.needs else None  # they will be collected; what else is wrong is told before
    found = [
        problem
        for problem in problems(model, composed, task.where, train_also=task.head)
        if collected is None or "statistics" not in problem.needs
    ]
    if found:
        raise RecipeError(composed.name, found)
    runs.claim(folder, settings)
    known = runs.finished(folder)
    if known is not None:
        return known
    begin = time.perf_counter()
    statistics, _ = Starts(task, probes).of(model, composed, seed)
    handle = adapt_(model, composed, task.where, statistics, seed=seed, train_also=task.head)
    curve = _fit(task, handle, folder, rate, steps, batch_size, accumulate, seed, save_every, quiet)
    model.eval()
    metrics = task.evaluate(model)
    result = {
        "metrics": metrics, "metric": task.metric_name, "retention": task.retention(model),
        "retention_measures": task.retention_note, "curve": curve, "trained_numbers": handle.trained_numbers,
        "seconds": time.perf_counter() - begin, "adapter": weights_of(handle), "coverage": repr(handle),
    }  # fmt: skip
    handle.save(folder / runs.ADAPTER)
    runs.keep_result(folder, result)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


def weights_of(handle: Handle) -> str:
    """A hash of everything trained: two runs with the same one ended alike."""
    from rankwise.lab.lean_trainer import weights_hash

    return weights_hash({key: tensor.float() for key, tensor in trained_tensors(handle).items()})


def _fit(
    task: Task,
    handle: Handle,
    out: Path,
    rate: float,
    steps: int,
    batch_size: int,
    accumulate: int,
    seed: int,
    save_every: int | None,
    quiet: bool,
) -> list[float]:
    """Trains from the newest checkpoint, if there is one; the loss of each step."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback, TrainingArguments

    from rankwise.interop.trainer import TrainerCallback
    from rankwise.lab.lean_trainer import LeanTrainer, Watch, newest_whole, tensor_curve

    resume = newest_whole(out)
    done = 0 if resume is None else int(resume.name.rpartition("-")[2])
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=batch_size // accumulate,
        gradient_accumulation_steps=accumulate, learning_rate=rate, max_grad_norm=0.0, seed=seed, data_seed=seed,
        save_strategy="steps", save_steps=save_every or max(1, min(100, steps // 10)), save_total_limit=2,
        logging_steps=1, logging_nan_inf_filter=False, report_to=[], disable_tqdm=True, remove_unused_columns=False,
        use_cpu=task.device == "cpu", dataloader_pin_memory=task.device != "cpu",
    )  # fmt: skip
    order = list(islice(task.order(seed), steps * batch_size))
    optimizer = handle.optimizer(lr=rate)
    schedule = LambdaLR(optimizer, lambda step: rate_at(min(step, steps - 1), steps))
    with Progress(steps - done, quiet=quiet) as progress, seeded(seed), quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*requires_grad=True to a scalar.*", category=UserWarning)
        progress.phase(handle.recipe.name if not done else f"{handle.recipe.name}, going on at step {done}")
        watch = Watch(progress.step)
        trainer = LeanTrainer(
            handle, args=arguments, train_dataset=order, data_collator=task.collate,  # type: ignore[arg-type]
            optimizers=(optimizer, schedule), callbacks=[TrainerCallback(handle, forward_only=True), watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        finally:
            watch.release()
    if watch.asked and trainer.state.global_step < steps:
        raise Stopped(f"stopped after step {trainer.state.global_step} of {steps}; the same command goes on from there")
    return tensor_curve(trainer.state)
