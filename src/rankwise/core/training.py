"""What the handle does around one optimizer step: the order of calls, the check for NaN, the second gradient of SAM."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import TrainingError
from rankwise.core.protocols import Perturbation
from rankwise.core.randomness import MaskStream
from rankwise.core.sharding import whole

Blocks = Mapping[str, Mapping[str, Tensor]]


class Calls:
    """Watches that `after_backward`, `optimizer.step` and `after_step` come in turn; a forgotten one would be silent otherwise.

    Args:
        backward: name of the piece that works between backward and step; None if there is none.
        step: name of the piece that works after the step; None if there is none.
        recipe: its name, for messages.
    """

    def __init__(self, backward: str | None, step: str | None, recipe: str) -> None:
        self.backward, self.step, self.recipe = backward, step, recipe
        self._backward_done = self._stepped = False
        self._gradient: weakref.ref[Tensor] | None = None

    def before_backward_part(self, blocks: Blocks) -> None:
        """At the start of `after_backward`.

        Raises:
            TrainingError: it ran on these very gradients before.
        """
        seen = None if self._gradient is None else self._gradient()
        if self.backward and self._backward_done and seen is not None and seen is _some_gradient(blocks):
            raise TrainingError(
                f"handle.after_backward() ran twice on the same gradients, and {self.backward} would act twice. When gradients "
                "are accumulated over micro-batches, call it once, after the last backward() and before optimizer.step()"
            )

    def after_backward_part(self, blocks: Blocks) -> None:
        """At the end of `after_backward`."""
        gradient = _some_gradient(blocks)
        self._gradient = None if gradient is None else weakref.ref(gradient)
        self._backward_done = True

    def before_step(self) -> None:
        """At the start of `optimizer.step`.

        Raises:
            TrainingError: `after_backward` of this step, or `after_step` of the last one, was forgotten.
        """
        if self._stepped and self.step:
            raise TrainingError(
                f"the recipe {self.recipe!r} has {self.step}, which works after the optimizer's step, but handle.after_step() "
                "was not called after the last one; call it after every optimizer.step(), before zero_grad()"
            )
        if self.backward and not self._backward_done:
            raise TrainingError(
                f"the recipe {self.recipe!r} has {self.backward}, which works between backward and step; "
                "call handle.after_backward() after loss.backward() and handle.after_step() after optimizer.step()"
            )
        self._stepped = True

    def after_step(self) -> None:
        """At the end of `after_step`."""
        self._backward_done = self._stepped = False
        self._gradient = None


def _some_gradient(blocks: Blocks) -> Tensor | None:
    return next((tensor.grad for block in blocks.values() for tensor in block.values() if tensor.grad is not None), None)


def check_finite(blocks: Blocks, step: int) -> None:
    """Looks for NaN and infinity in the gradients.

    Raises:
        TrainingError: names the first tensor that has some.
    """
    for site, block in blocks.items():
        for role, tensor in block.items():
            if tensor.grad is not None and not torch.isfinite(whole(tensor.grad)).all():
                raise TrainingError(
                    f"step {step}: the gradient of {site}.{role} holds NaN or infinity. The weights are "
                    "those of the last good step; lower the learning rate, or look for NaN in this batch"
                )


def second_gradient(
    model: nn.Module,
    perturbation: Perturbation,
    blocks: Blocks,
    masks: MaskStream,
    learning_rate: float,
    replay: Callable[[], Any] | None,
    then: Callable[[], None],
) -> None:
    """Moves, takes the gradients again with the dropout masks of the first pass, and moves back to the bit.

    Args:
        model: whose running statistics (batch norm) are to see the batch once.
        perturbation: a two-pass one.
        blocks: every trained tensor.
        masks: of the adapter.
        learning_rate: of the next step.
        replay: runs the forwards and backwards of this step again.
        then: adds what belongs to the loss but not to the batch, at the moved point.

    Raises:
        TrainingError: there is no replay, or it is not the step again.
    """
    if replay is None:
        raise TrainingError(
            f"{type(perturbation).__name__} takes the gradient a second time; pass a function that runs forward and "
            "backward of this batch again: handle.after_backward(lambda: model(**batch).loss.backward())"
        )
    perturbation.move(blocks, learning_rate=learning_rate)
    try:
        for block in blocks.values():
            for tensor in block.values():
                tensor.grad = None
        with masks.replayed(), running_statistics_kept(model), torch.enable_grad():
            replay()
        if _some_gradient(blocks) is None:
            raise TrainingError(
                "the replay gave no gradient; it has to run forward and backward: lambda: loss(batch).backward()"
            )
        then()
    finally:
        perturbation.restore(blocks)


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Brings the running statistics of normalization layers back afterwards."""
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
