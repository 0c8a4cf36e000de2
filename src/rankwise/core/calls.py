"""Watches that the calls around one optimizer step come in turn."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor

from rankwise.core.errors import TrainingError

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
        if self.backward and self._backward_done and seen is not None and seen is some_gradient(blocks):
            raise TrainingError(
                f"handle.after_backward() ran twice on the same gradients, and {self.backward} would act twice. When gradients "
                "are accumulated over micro-batches, call it once, after the last backward() and before optimizer.step()"
            )

    def after_backward_part(self, blocks: Blocks) -> None:
        """At the end of `after_backward`."""
        gradient = some_gradient(blocks)
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


def some_gradient(blocks: Blocks) -> Tensor | None:
    """Any gradient that is there."""
    return next((tensor.grad for block in blocks.values() for tensor in block.values() if tensor.grad is not None), None)
