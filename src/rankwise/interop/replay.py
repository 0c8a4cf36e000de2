"""Running the micro-batches of one optimizer step again, as two-pass methods (SAM) need, without a hand on the training loop.

A loop such as transformers' Trainer owns forward, loss scaling and backward. What it did is recorded at the model's border:
the inputs of every training forward, the states of the random generators, and the number c that backward sends into
`outputs.loss` (accumulation, token counts and world size are all in it). The replay calls the model with the same inputs and
generators and runs `loss.backward(c)`. This is exact where the loss comes out of the model; the first step checks it by
replaying at the unmoved point, and refuses when the gradients are not the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import TrainingError
from rankwise.core.handle import Handle
from rankwise.core.randomness import inside_backward
from rankwise.core.training import running_statistics_kept

AGREE = 1e-3  # relative difference of a repeated gradient that rounding on parallel devices explains


@dataclass
class _Forward:
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    generators: list[Tensor]
    received: list[Tensor] = field(default_factory=list)


class Recorder:
    """Records the training forwards of a model between two optimizer steps.

    Args:
        handle: the adapter being trained.
        after: called after a replay's backward, to reduce and clip gradients as the loop does.
    """

    def __init__(self, handle: Handle, after: Callable[[], None]) -> None:
        self.handle, self.after = handle, after
        self.forwards: list[_Forward] = []
        self.checked = False
        self._replaying = False
        eagerly: Any = torch.compiler.disable
        self._hooks = [
            handle.model.register_forward_pre_hook(eagerly(self._before), with_kwargs=True),
            handle.model.register_forward_hook(eagerly(self._behind), with_kwargs=True),
        ]

    def close(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self.forwards.clear()

    def _before(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self._replaying or not model.training or not torch.is_grad_enabled() or inside_backward():
            return
        kept = {key: _kept(value) for key, value in keywords.items()}
        self.forwards.append(_Forward(tuple(_kept(value) for value in arguments), kept, _generators()))

    def _behind(self, model: nn.Module, arguments: Any, keywords: Any, outputs: Any) -> None:
        if self._replaying or not model.training or not torch.is_grad_enabled() or inside_backward():
            return
        loss, forward = _loss_of(outputs), self.forwards[-1]
        if loss is not None and loss.requires_grad:
            loss.register_hook(lambda gradient: forward.received.append(gradient.detach().clone()))

    def replay(self) -> None:
        """Runs forward and backward of everything recorded again, at the parameters as they are now.

        Raises:
            TrainingError: the loop's loss did not come out of the model, so that it cannot be repeated.
        """
        if not self.forwards or any(len(forward.received) != 1 for forward in self.forwards):
            raise TrainingError(
                "the second pass repeats what the model returns as `loss`, but this loop computes its loss outside of "
                "the model (label smoothing, compute_loss_func, a compute_loss of its own); let the model compute the loss, or "
                "write the loop by hand and call handle.after_backward(replay)"
            )
        kept = _generators()
        self._replaying = True
        try:
            for forward in self.forwards:
                _set_generators(forward.generators)
                loss = _loss_of(self.handle.model(*forward.arguments, **forward.keywords))
                if loss is None:
                    raise TrainingError("the model returned a loss in the first pass and none in the second")
                loss.backward(forward.received[0])
        finally:
            self._replaying = False
            _set_generators(kept)
        self.after()

    def check(self) -> None:
        """Once: replays at the unmoved point and compares the gradients with those that are there; leaves these as they were.

        Raises:
            TrainingError: they differ, so the replay would not be this step's second pass.
        """
        if self.checked:
            return
        blocks = {**self.handle.blocks(), **self.handle.plain_blocks()}
        tensors = [tensor for block in blocks.values() for tensor in block.values()]
        first = [tensor.grad for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.grad = None
            with self.handle.masks.replayed(), running_statistics_kept(self.handle.model):
                self.replay()
            pairs = [(old, tensor.grad) for old, tensor in zip(first, tensors, strict=True)]
        finally:
            for tensor, old in zip(tensors, first, strict=True):
                tensor.grad = old
        size = sum(float(old.norm()) ** 2 for old, _ in pairs if old is not None) ** 0.5
        off = sum(float(_minus(old, new).norm()) ** 2 for old, new in pairs if old is not None or new is not None) ** 0.5
        if not off <= AGREE * size:
            raise TrainingError(
                f"repeating this step's forward and backward gives a gradient that is {off / (size or 1.0):.3g} off, so a "
                "second pass would not be exact. The loss has a part that the model does not return, or the model draws random "
                "numbers that cannot be repeated; write the loop by hand and call handle.after_backward(replay)"
            )
        self.checked = True


def _minus(old: Tensor | None, new: Tensor | None) -> Tensor:
    if old is not None and new is not None:
        return old - new
    found = old if new is None else new
    if found is None:
        raise TypeError("no gradient to compare; this is a bug in rankwise")
    return found


def _kept(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and not value.requires_grad else value


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, tuple) and outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:
        loss = outputs[0]
    return loss if isinstance(loss, Tensor) else None


def _generators() -> list[Tensor]:
    """States of the global generators that layers of the base (its own dropout) draw from: CPU first, then every GPU in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _set_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
