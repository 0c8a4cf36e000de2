"""transformers' Trainer with checkpoints that hold the adapter and the training state, not the frozen base.

A checkpoint is whole when its last file, written by `TrainerCallback`, is there; a kill leaves the one before it whole.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.core import checkpoint
from rankwise.core.bank import BANKS
from rankwise.core.errors import CheckpointError, TrainingError, shorten
from rankwise.core.handle import Handle
from rankwise.interop.trainer import FOLDER, LAST_GOOD, STATE_NAME


class LeanTrainer(Trainer):
    """Trains one adapter on rows in a given order.

    Args:
        handle: the adapter; the other arguments are the Trainer's.
    """

    def __init__(self, handle: Handle, **arguments: Any) -> None:
        super().__init__(model=handle.model, **arguments)
        self.handle = handle
        self.forward_only = handle.perturbation is not None and handle.perturbation.forward_only

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The dataset is in training order already."""
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; for methods without backward, what the handle does instead."""
        if not self.forward_only:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        return self.handle.backward(lambda: self.compute_loss(model, inputs))

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        """The model's loss; one that is not finite ends the run with the adapter of the last good step saved."""
        found = super().compute_loss(model, inputs, return_outputs, **options)
        loss = float((found[0] if isinstance(found, tuple) else found).detach())
        if not math.isfinite(loss):
            folder = Path(str(self.args.output_dir)) / LAST_GOOD
            self.handle.save(folder)
            raise TrainingError(
                f"the loss of step {self.state.global_step} is {loss}; the adapter of the last good step is in {folder}. Lower "
                "the learning rate, or look for NaN in the data"
            )
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Nothing but the folder: `TrainerCallback` writes the adapter, and the base is where it was."""
        Path(output_dir or str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Puts the checkpoint's adapter into the model."""
        folder = Path(resume_from_checkpoint) / FOLDER
        _, tensors = checkpoint.read(folder)
        state = {self._key(key): tensor for key, tensor in tensors.items()}
        unused = self.handle.model.load_state_dict(state, strict=False).unexpected_keys
        if unused:
            raise CheckpointError(f"{folder} holds tensors that have no place in this adapter: {shorten(unused)}")

    def _key(self, key: str) -> str:
        """The model's key of a tensor of the checkpoint."""
        name = self.handle.name
        if key in self.handle.auxiliary:
            return key
        if key.startswith(f"{BANKS}."):
            return f"{BANKS}.{name}.{key.removeprefix(f'{BANKS}.')}"
        site = max((site for site in self.handle.targets if key.startswith(f"{site}.")), key=len)
        return f"{site}.adapter.{name}.{key.removeprefix(f'{site}.')}"


class Watch(TrainerCallback):
    """Shows each step, and turns the first Ctrl-C into a checkpoint and a clean stop; the second stops at once.

    Args:
        on_step: called with the number of steps done and the loss.
    """

    def __init__(self, on_step: Callable[[int, float], None]) -> None:
        self.on_step, self.asked = on_step, False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Listens for Ctrl-C, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops if Ctrl-C was pressed."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Passes the loss on."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.on_step(state.global_step, float(logs["loss"]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Gives Ctrl-C back."""
        self.release()

    def release(self) -> None:
        """Gives Ctrl-C back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.asked:
            self.release()
            raise KeyboardInterrupt
        self.asked = True


def newest_whole(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end; halves that a kill left behind are removed."""
    found: dict[int, Path] = {}
    for folder in out.glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if not number.isdigit():
            continue
        if (folder / FOLDER / STATE_NAME).is_file():
            found[int(number)] = folder
        else:
            shutil.rmtree(folder)
    return found[max(found)] if found else None


def tensor_curve(state: TrainerState) -> list[float]:
    """The training loss of each step."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """A short name for a set of tensors, for telling whether two runs ended alike."""
    import hashlib

    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
