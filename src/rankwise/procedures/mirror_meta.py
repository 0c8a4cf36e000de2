"""MetaMiDA: few-shot adaptation by mirror descent in a geometry that is learned over tasks.

    φ_k = h(z_k),   z_{k+1} = z_k - a ∇_φ L_task(φ_k),   k = 0 … K - 1          φ_K is the adapted model

The dual variables z have the shapes of the trained tensors φ, and h (`mirror_map.py`) is the inverse mirror map, ∇ψ*. Outer
steps move the shared start z₀ and h along the gradient of Σ_tasks L_query(φ_K), through the inner steps. h = I is MAML, a
diagonal h is Meta-SGD, h = softmax is exponentiated gradient. The gradient is taken with respect to φ and moves z: no chain
rule through h inside. `meta_adapter.py` does this on the trained tensors of an adapter.

A mirror map would be monotone; h is guaranteed to be invertible only. Cost: a pass of h per inner step and its backward, and
for one outer step the graphs of all K steps of a task. Meta-checkpoint: (z₀, θ of h).

Zhang, Li, Giannakis: Meta-Learning with Versatile Loss Geometries for Fast Adaptation Using Mirror Descent, 2023,
arXiv:2312.13486.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, TrainingError
from rankwise.procedures.mirror_map import MirrorMap

__all__ = ["MirrorMap", "adapt_task", "meta_train"]

Loss = Callable[[list[Tensor]], Tensor]
MOMENTUM, DECAY, FALL = 0.9, 1e-4, 0.1  # of the outer SGD, and what its rate is multiplied by every `fall_every` iterations


def adapt_task(
    mirror: Callable[[list[Tensor]], Sequence[Tensor]],
    z0: Sequence[Tensor],
    loss: Loss,
    *,
    steps: int = 5,
    rate: float = 1e-2,
    second_order: bool = True,
) -> list[Tensor]:
    """K steps of mirror descent on a task's loss, from z₀.

    Args:
        mirror: h, any function from lists of tensors to lists of tensors of the same shapes.
        z0: where it starts.
        loss: of the parameters φ.
        steps: K.
        rate: a.
        second_order: keep the graph of the gradients; without, they count as constants (for evaluation, or first-order
            meta-training).

    Returns:
        φ_K, differentiable in z₀ and in what h is made of.
    """
    with torch.enable_grad():
        z = list(z0)
        for _ in range(steps):
            phi = [tensor if tensor.requires_grad else tensor.detach().requires_grad_() for tensor in mirror(z)]
            gradients = torch.autograd.grad(loss(phi), phi, create_graph=second_order, allow_unused=True)
            unused = [number for number, gradient in enumerate(gradients) if gradient is None]
            if unused:
                raise TrainingError(
                    f"the task's loss does not depend on tensors {unused} of {len(phi)}; adapt only tensors that it uses"
                )
            z = [dual - rate * gradient for dual, gradient in zip(z, gradients, strict=True)]
        return list(mirror(z))


def meta_train(
    mirror: nn.Module,
    z0: Sequence[nn.Parameter],
    tasks: Callable[[int], Sequence[tuple[Loss, Loss]]],
    *,
    iterations: int = 60000,
    steps: int = 5,
    rate: float = 1e-2,
    meta_rate: float = 1e-3,
    fall_every: int = 20000,
    second_order: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Learns z₀ and h over tasks, in place.

    Args:
        mirror: h.
        z0: the shared start.
        tasks: iteration -> a few tasks (the paper takes four), each as the losses of its support and query set.
        iterations: outer steps.
        steps, rate, second_order: of the inner loop.
        meta_rate, fall_every: of the outer SGD (Nesterov momentum 0.9, weight decay 1e-4), whose rate falls to a tenth now and
            then. Adam diverges on some data.
        optimizer: another one over z₀ and h, in place of that.
        report: called with the iteration and its mean query loss, for a progress bar.

    Returns:
        The mean query loss of every iteration.
    """
    scheduler = None
    if optimizer is None:
        learned = [*z0, *mirror.parameters()]
        optimizer = torch.optim.SGD(learned, lr=meta_rate, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, fall_every, FALL)
    elif (meta_rate, fall_every) != (1e-3, 20000):
        raise ArgumentError("meta_rate and fall_every belong to the optimizer made here; set the rate of the one you pass")
    losses = []
    for iteration in range(iterations):
        optimizer.zero_grad()
        drawn = tasks(iteration)
        total = 0.0
        for support, query in drawn:  # one task's graph at a time
            phi = adapt_task(mirror, z0, support, steps=steps, rate=rate, second_order=second_order)
            loss = query(phi) / len(drawn)
            loss.backward()
            total += float(loss.detach())
        if not torch.isfinite(torch.tensor(total)):
            raise TrainingError(f"iteration {iteration}: the query loss is {total}; lower the inner rate or meta_rate")
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(total)
        if report is not None:
            report(iteration, total)
    return losses
