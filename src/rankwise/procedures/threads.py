"""Running a model of two-thread layers: through one thread, without its normalization layers, and under attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.core.bindings import adapted_layers
from rankwise.core.errors import TrainingError
from rankwise.core.training import evaluating
from rankwise.parameterizations.two_threads import TwoThreads

NOISE = 0.001  # standard deviation of an attack's start
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The model's logits (batch, classes), also where it wraps them."""
    found = model(x)
    return getattr(found, "logits", found)


def _entries(model: nn.Module) -> list[TwoThreads]:
    entries = [entry for _, _, adapters in adapted_layers(model) for entry in adapters.values()]
    return [entry for entry in entries if isinstance(entry, TwoThreads)]


def check_threads(model: nn.Module) -> None:
    """Checks that there are layers with two threads.

    Raises:
        TrainingError: there are none.
    """
    if not _entries(model):
        raise TrainingError("this model has no layers with two threads; adapt it with autolora_robust")


@contextmanager
def on_thread(model: nn.Module, thread: str) -> Iterator[None]:
    """Sends the forwards of a with-block through one thread of every layer that has two."""
    kept = [(entry, entry.thread) for entry in _entries(model)]
    try:
        for entry, _ in kept:
            entry.thread = thread
        yield
    finally:
        for entry, before in kept:
            entry.thread = before


@contextmanager
def without_norms(model: nn.Module) -> Iterator[None]:
    """Forwards of the with-block give no gradient to normalization layers; the graphs of others keep theirs."""
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    trained = [tensor for module in norms for tensor in module.parameters(recurse=False) if tensor.requires_grad]
    try:
        for tensor in trained:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in trained:
            tensor.requires_grad_(True)


def attack(
    model: nn.Module, x: Tensor, y: Tensor, *, radius: float, step_size: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Images near x that a model takes for another class, by projected gradient steps.

    Args:
        model: any that gives logits; of layers with two threads the adversarial one is attacked.
        x: images in [0, 1].
        y: classes.
        radius: largest change of a pixel.
        step_size: change of a pixel per step.
        steps: how many.
        generator: draws the start.

    Returns:
        x', with ‖x' - x‖∞ <= radius, in [0, 1]. Gradients of the model's tensors are left as they were.

    Raises:
        TrainingError: x are no images in [0, 1].
    """
    if not x.is_floating_point() or bool((x < 0).any() | (x > 1).any()):
        raise TrainingError(
            "an attack moves images whose pixels are numbers in [0, 1]; scale them so, and normalize inside the model "
            f"(the inputs here are {x.dtype}, from {float(x.min()):g} to {float(x.max()):g})"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):  # its gradient hooks are for the step itself
        model = model.module
    x = x.detach()
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32).to(x)
    adversarial = x + NOISE * noise
    with evaluating(model), on_thread(model, "adversarial"):
        for _ in range(steps):
            adversarial.requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(logits_of(model, adversarial), y)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial.detach() + step_size * gradient.sign()
            adversarial = moved.clamp(min=x - radius, max=x + radius).clamp_(0.0, 1.0)
    return adversarial.detach().clamp(min=x - radius, max=x + radius).clamp_(0.0, 1.0)
