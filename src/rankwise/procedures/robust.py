"""AutoLoRa: robust fine-tuning in two threads, with loss weights that set themselves.

    z_nat = f(x) through the natural thread of every layer, z_adv = f(x') through the adversarial one (`two_threads.py`)
    L = λ₁ CE(z_nat, y) + (1 - λ₁) CE(z_adv, y) + λ₂ KL(softmax z_nat ‖ softmax z_adv),   λ₁ = 1 - S, λ₂ = scale · S

S is the accuracy of the natural thread on training data: first learn the images, then their neighborhoods. x' is found by PGD:
x + 0.001 N(0, 1), then steps of `step_size` along the sign of ∇CE of the adversarial thread in eval mode, inside
‖x' - x‖∞ <= radius and [0, 1]. Through z_nat only B, A and the head get gradients, z_nat inside KL included; through z_adv the
weights, normalization layers and the head (both where the adapter trains them: `train_also`). Deploy without the branch.

The inputs must be images in [0, 1], with any normalization inside the model, so a loop has to call `handle.procedure.loss`:

    loss = handle.backward(lambda: handle.procedure.loss(model, x, y)); optimizer.step(); handle.after_step()

Not the AutoLoRA that searches ranks. Cost: `attack_steps` forwards and backwards for x', then two of each.

*Differs* from the release: S is measured on the batches of training as they come, or by `measure`; normalization layers have
one set of statistics, which both threads move.

Xu, Zhang, Kankanhalli: AutoLoRa: A Parameter-Free Automated Robust Fine-Tuning Framework, 2023, arXiv:2310.01818.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, TrainingError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure
from rankwise.core.randomness import generator_for
from rankwise.core.step import Block
from rankwise.core.training import evaluating
from rankwise.procedures.rate_controller import RateController
from rankwise.procedures.threads import attack, check_threads, logits_of, on_thread, without_norms

__all__ = ["AutoLoRaRobust", "RateController", "attack"]


@register("procedure")
class AutoLoRaRobust(Procedure):
    """The robust loss and its weights.

    Args:
        step_size, radius, attack_steps: of PGD.
        scale: λ₂ / S.
        update_every: steps after which S becomes the accuracy on the batches since; None takes each batch's own.

    Attributes:
        natural_accuracy: S; set it, or call `measure`, to fix it from outside. None: not known yet, so each batch's own.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"weight", "A", "B"})

    def __init__(
        self,
        *,
        step_size: float = 2 / 255,
        radius: float = 8 / 255,
        attack_steps: int = 10,
        scale: float = 6.0,
        update_every: int | None = None,
    ) -> None:
        if step_size <= 0 or radius < 0 or attack_steps < 0 or scale < 0 or (update_every is not None and update_every < 1):
            raise ArgumentError(
                "step_size > 0, radius >= 0, attack_steps >= 0, scale >= 0 and update_every >= 1 (or None) are needed, not "
                f"{step_size}, {radius}, {attack_steps}, {scale} and {update_every}"
            )
        self.step_size, self.radius, self.attack_steps, self.scale = step_size, radius, attack_steps, scale
        self.update_every = update_every
        self.natural_accuracy: float | None = None
        self.steps, self._called = 0, False
        self._seen: list[Tensor] = []  # (right answers, answers) of the batches since S was set

    def lambdas(self, accuracy: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """λ₁ = 1 - S and λ₂ = scale · S."""
        return 1 - accuracy, self.scale * accuracy

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss of images x in [0, 1] and their classes y, through both threads."""
        check_threads(model)
        draw = generator_for(0, "attack", self.steps)
        x_adv = attack(model, x, y, radius=self.radius, step_size=self.step_size, steps=self.attack_steps, generator=draw)
        with on_thread(model, "natural"), without_norms(model):
            natural = logits_of(model, x)  # (batch, classes)
        with on_thread(model, "adversarial"):
            adversarial = logits_of(model, x_adv)  # (batch, classes)
        right = (natural.detach().argmax(1) == y).sum()
        self._called = True
        if self.update_every is not None:
            self._seen.append(torch.stack([right, torch.full_like(right, len(y))]))
        accuracy = right / len(y) if self.natural_accuracy is None else self.natural_accuracy
        divergence = F.kl_div(adversarial.log_softmax(1), natural.log_softmax(1), reduction="batchmean", log_target=True)
        first, second = self.lambdas(accuracy)
        both = first * F.cross_entropy(natural, y) + (1 - first) * F.cross_entropy(adversarial, y)
        return both + second * divergence

    def measure(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Sets S to the accuracy of the natural thread in eval mode on batches (x, y) of training data, and returns it."""
        right = count = 0
        with evaluating(model), on_thread(model, "natural"):
            for x, y in batches:
                right, count = right + int((logits_of(model, x).argmax(1) == y).sum()), count + len(y)
        if not count:
            raise ArgumentError("measure() got no batches")
        self.natural_accuracy = right / count
        return self.natural_accuracy

    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Checks that the gradients are those of the robust loss."""
        self._check_called()

    def _check_called(self) -> None:
        if not self._called:
            raise TrainingError(
                "autolora_robust trains two threads, but this step's loss went through one of them only. Let it make the loss, "
                "from images in [0, 1] and their classes: handle.backward(lambda: handle.procedure.loss(model, x, y))"
            )

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Sets S where that is due."""
        self._check_called()
        self.steps, self._called = self.steps + 1, False
        if self.update_every is not None and self.steps % self.update_every == 0:
            counts = torch.stack(self._seen).sum(0)  # (2,)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            right, count = counts.tolist()
            self.natural_accuracy, self._seen = right / count, []
        return {}

    def state_dict(self) -> dict[str, Any]:
        """S, the clock, and what was seen since S was set."""
        return {"steps": self.steps, "natural_accuracy": self.natural_accuracy, "seen": [one.clone() for one in self._seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.steps, self.natural_accuracy = int(state["steps"]), state["natural_accuracy"]
        self._seen = [one.clone() for one in state["seen"]]
