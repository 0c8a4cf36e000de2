"""`TrainerCallback`: a rankwise adapter under transformers' Trainer.

    handle = rankwise.adapt_(model, recipe)
    Trainer(model, args, …, optimizers=(handle.optimizer(lr=2e-4), None), callbacks=[TrainerCallback(handle)]).train()

Under FSDP the Trainer refuses `optimizers=`; there this does the same:

    optimizer_cls_and_kwargs=(lambda: lambda model, lr: handle.optimizer(lr), {"lr": 2e-4})

Between backward and the optimizer's step it calls `handle.after_backward`, between the step and zero_grad `handle.after_step`.
Into every checkpoint folder it writes `rankwise/`: the adapter as `handle.save` does, and the training state (step count,
masks, schedules) for resuming to the same weights. A gradient that is not finite stops training with the adapter of the last
good step in `<output_dir>/last_good`. Two-pass methods repeat the step's micro-batches, see `replay`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback as _Callback
from transformers import TrainerControl, TrainerState, TrainingArguments

from rankwise.core import checkpoint, decisions, merge
from rankwise.core.checkpoint import trained_tensors
from rankwise.core.errors import CheckpointError, TrainingError, shorten
from rankwise.core.handle import Handle
from rankwise.core.sharding import is_sharded, whole
from rankwise.interop.replay import Recorder

FOLDER, STATE_NAME, LAST_GOOD = "rankwise", "training.safetensors", "last_good"


class TrainerCallback(_Callback):
    """Trains, saves and resumes one adapter under transformers' Trainer.

    Args:
        handle: of the adapter on the Trainer's model. The Trainer's optimizer must be `handle.optimizer(…)`.
        resume_from: the checkpoint folder of `train(resume_from_checkpoint=…)`, where it is not in `output_dir`.
        forward_only: whether the Trainer's training_step calls `handle.backward` itself, for methods without backward.
    """

    def __init__(self, handle: Handle, *, resume_from: str | Path | None = None, forward_only: bool = False) -> None:
        self.forward_only = forward_only
        self.handle, self.resume_from = handle, None if resume_from is None else Path(resume_from)
        self._recorder: Recorder | None = None
        self._fitting: Any = handle.model.register_load_state_dict_pre_hook(self._fit)

    # -- the Trainer's events ------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Checks that model and optimizer are the adapter's, and takes up the training state when resuming."""
        self._fitting.remove()
        self._check_model(kwargs["model"])
        self._check_optimizer(kwargs["optimizer"])
        if self._forward_only and not self.forward_only:
            raise TrainingError(
                f"the Trainer runs backward, and {self.handle.recipe.name!r} needs none; write the loop by hand with "
                "loss = handle.backward(lambda: model(**batch).loss), or use `rankwise train`"
            )
        settings: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and settings.get("use_reentrant"):
            self.handle.model.enable_input_require_grads()  # type: ignore[operator]  (else a frozen input stops all gradients)
        parts = [part for part in (self.handle.perturbation, self.handle.procedure) if part is not None]
        twice = next((type(part).__name__ for part in parts if part.second_pass), None)
        if twice is not None:
            if _sharded(self.handle):
                raise TrainingError(
                    f"{twice} repeats the step's forward and backward, which is not exact "
                    "with sharded parameters (FSDP); use DDP, or another perturbation"
                )
            self._recorder = Recorder(self.handle, lambda: self._finish_gradients(args))
        if state.global_step > 0:
            self._resume(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After backward of the last micro-batch."""
        if self._forward_only:
            return  # the loop has called handle.backward
        try:
            if self._recorder is None:
                self.handle.after_backward(check_finite=not args.fp16)
            else:
                self._recorder.check()
                self.handle.after_backward(self._recorder.replay, check_finite=not args.fp16)
        except TrainingError as error:
            folder = Path(str(args.output_dir)) / LAST_GOOD
            self._save(args, folder)
            raise TrainingError(f"{error}. The adapter of the last good step is in {folder}") from error
        finally:
            if self._recorder is not None:
                self._recorder.forwards.clear()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the optimizer's step, the gradients still there."""
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):  # a gradient scaler met infinity
            self.handle.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds adapter and training state to the checkpoint just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_hyper_param_search or (args.process_index == 0 and not folder.is_dir()):
            raise CheckpointError(f"{folder} is where this Trainer's checkpoint should be, and it is not there")
        self._save(args, folder / FOLDER)
        if args.process_index == 0:
            _write_state(folder / FOLDER / STATE_NAME, {"global_step": state.global_step, **self.handle.state_dict()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the hooks off the model."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        self._fitting = self.handle.model.register_load_state_dict_pre_hook(self._fit)

    @property
    def _forward_only(self) -> bool:
        return self.handle.perturbation is not None and self.handle.perturbation.forward_only

    # -- what they need ------------------------------------------------------------------------------------------------

    def _check_model(self, model: nn.Module) -> None:
        inner: Any = model
        while inner is not self.handle.model and (hasattr(inner, "module") or hasattr(inner, "_orig_mod")):
            inner = inner.module if hasattr(inner, "module") else inner._orig_mod
        if inner is not self.handle.model:
            raise TrainingError(
                f"the Trainer trains a {type(model).__name__} that the adapter {self.handle.name!r} is not on; give the "
                "Trainer the model that adapt_ was called with"
            )

    def _check_optimizer(self, optimizer: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.handle._optimizer is None or inner is not self.handle._optimizer:
            raise TrainingError(
                f"the Trainer runs {type(inner).__name__}, not the optimizer of the recipe {self.handle.recipe.name!r}, whose "
                "steps would have no effect; pass optimizers=(handle.optimizer(lr=…), None) to the Trainer"
            )

    def _save(self, args: TrainingArguments, folder: Path) -> None:
        if args.process_index == 0 or _sharded(self.handle):  # sharded tensors are gathered by all processes together
            self.handle.save(folder)

    def _finish_gradients(self, args: TrainingArguments) -> None:
        """What the Trainer does to gradients after backward: the mean over processes, and clipping."""
        tensors = [t for block in {**self.handle.blocks(), **self.handle.plain_blocks()}.values() for t in block.values()]
        if args.world_size > 1:
            for tensor in tensors:
                if tensor.grad is not None:
                    torch.distributed.all_reduce(tensor.grad)
                    tensor.grad /= args.world_size
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(tensors, args.max_grad_norm)

    def _fit(self, model: nn.Module, state: Mapping[str, Tensor], *_: Any) -> None:
        """Before the Trainer loads a checkpoint: makes room for what schedules and restarts had left there.

        Cuts ranks, and adds the absorbed factors of restarts; the weight under these is kept before it is overwritten.
        """
        for site in self.handle.targets:
            entry = self.handle.parameterization(site)
            key = f"{site}.adapter.{self.handle.name}."
            own = {name.removeprefix(key): tuple(tensor.shape) for name, tensor in state.items() if name.startswith(key)}
            if own:
                self.handle.make_room(site, own)
            stored = [tensor.shape[1] for name, tensor in state.items() if name.startswith(key) and name.endswith(".B")]
            if stored and stored[0] < entry.rank and "B" in entry.roles():
                decisions.resize(entry, torch.arange(entry.rank) < stored[0], self.handle._optimizer)
            parts = {part: state.get(f"{key}{part}") for part in ("carried_B", "carried_A")}
            for part, tensor in parts.items():
                here = getattr(entry, part)
                if tensor is not None and (here is None or here.shape != tensor.shape):
                    setattr(entry, part, torch.zeros_like(tensor, device=self.handle.targets[site].parameter().device))
            adapters = self.handle.adapters(site)
            if parts["carried_B"] is not None and adapters.stash is None:
                adapters.stash = self.handle.targets[site].parameter().detach().clone()

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        default = args.resume_from_checkpoint
        guess = (
            Path(default)
            if default not in (None, "True", "true")
            else Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        )
        folder = (self.resume_from or guess) / FOLDER
        if not (folder / STATE_NAME).is_file():
            raise CheckpointError(
                f"training resumes at step {state.global_step}, but {folder} holds no training state of rankwise; if the "
                "checkpoint is elsewhere, say TrainerCallback(handle, resume_from=…)"
            )
        stored = _read_state(folder / STATE_NAME)
        if stored["global_step"] != state.global_step:
            raise CheckpointError(f"{folder} is of step {stored['global_step']}, training resumes at step {state.global_step}")
        description = self._check_tensors(folder)
        for site, target in self.handle.targets.items():
            self.handle.parameterization(site).absorbed = bool(description["sites"][site]["absorbed"])
            if self.handle.adapters(site).stash is not None:
                merge.rewrite(target)
        self.handle.load_state_dict(stored)

    def _check_tensors(self, folder: Path) -> dict[str, Any]:
        """The tensors that the Trainer has loaded must be those of the folder whose state is taken up."""
        description, tensors = checkpoint.read(folder)
        here = {key: whole(tensor.detach()).cpu() for key, tensor in trained_tensors(self.handle).items()}
        different = [key for key in sorted({*tensors, *here}) if not _same(tensors.get(key), here.get(key))]
        if different:
            raise CheckpointError(
                f"{len(different)} of {len(here)} tensors of the adapter are not those of {folder} ({shorten(different)}); "
                "resume from the folder that the Trainer loads, and adapt the model with the same recipe and seed as before"
            )
        return description


def _same(stored: Tensor | None, here: Tensor | None) -> bool:
    return stored is not None and here is not None and stored.dtype == here.dtype and torch.equal(stored, here)


def _sharded(handle: Handle) -> bool:
    return any(is_sharded(tensor) for block in handle.blocks().values() for tensor in block.values())


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    """One safetensors file: tensors as such, everything else as JSON in its metadata."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_without_tensors(state, tensors))
    temporary = path.with_name(f".writing-{path.name}")
    try:
        save_file({**tensors, "format": torch.zeros(1)}, temporary, metadata={"state": text})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({error})") from error


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"tensor{len(tensors)}"
        tensors[name] = whole(value.detach()).cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _without_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"training state holds a {type(value).__name__}; this is a bug in rankwise")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            data = json.loads((file.metadata() or {})["state"])
        return _with_tensors(data, checkpoint.read_tensors(path))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); resume from an earlier checkpoint") from error


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor"}:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value["mapping"]}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value
