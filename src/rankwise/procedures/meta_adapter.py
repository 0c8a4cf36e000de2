"""Meta-learning an adapter: where its tensors start on a new task, and in which geometry a few steps adapt them.

    φ = the trained tensors of a handle (LoRA's B and A of every site, a head trained beside them), by mirror descent

The base stays frozen. What comes out of an adaptation are ordinary values of the adapter's tensors, so that it is saved, merged
and exported like any other; see `mirror_meta.py` for the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rankwise.core.errors import TrainingError
from rankwise.core.handle import Handle
from rankwise.core.randomness import generator_for
from rankwise.procedures.mirror_map import MirrorMap
from rankwise.procedures.mirror_meta import Loss, adapt_task, meta_train

Run = Callable[..., Any]  # runs the model with some tensors in the adapter's places


class MetaAdapter:
    """The meta-learned start and geometry of an adapter's trained tensors (and of a head trained beside it).

    Attributes:
        z0: the shared start, one dual tensor per trained one.
        mirror: h.
        losses: mean query loss of every outer step.
    """

    def __init__(self, handle: Handle, *, block: int = 4, shrink: int = 2) -> None:
        self.handle, self.losses = handle, []
        names = {id(tensor): name for name, tensor in handle.model.named_parameters()}
        blocks = [*handle.blocks().values(), *handle.plain_blocks().values()]
        self.tensors = {names[id(tensor)]: tensor for one in blocks for tensor in one.values()}
        shapes = [tuple(tensor.shape) for tensor in self.tensors.values()]
        first = next(iter(self.tensors.values()), None)
        if first is None:
            raise TrainingError("no tensor of this adapter is trained, so there is nothing to adapt to tasks")
        mirror = MirrorMap(shapes, block=block, shrink=shrink, generator=generator_for(handle.seed, "mirror_meta"))
        self.mirror = mirror.to(device=first.device, dtype=first.dtype)
        self.z0 = [nn.Parameter(tensor.detach().clone()) for tensor in self.tensors.values()]

    def run_with(self, phi: Sequence[Tensor]) -> Run:
        """The model as a function, with φ in the places of the trained tensors."""
        placed = dict(zip(self.tensors, phi, strict=True))

        def run(*arguments: Any, **keywords: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
                return torch.func.functional_call(self.handle.model, placed, arguments, keywords)

        return run

    def adapted(self, loss: Callable[[Run], Tensor], *, steps: int = 5, rate: float = 1e-2) -> list[Tensor]:
        """φ_K on a task's loss, by the first-order graph."""
        duals = [tensor.detach() for tensor in self.z0]
        found = adapt_task(self.mirror, duals, lambda phi: loss(self.run_with(phi)), steps=steps, rate=rate, second_order=False)
        return [tensor.detach() for tensor in found]

    @torch.no_grad()
    def adapt_(self, loss: Callable[[Run], Tensor], *, steps: int = 5, rate: float = 1e-2) -> None:
        """Puts φ_K into the adapter, which can then be saved, merged and exported like any other."""
        for tensor, value in zip(self.tensors.values(), self.adapted(loss, steps=steps, rate=rate), strict=True):
            tensor.copy_(value)


def mirror_meta(
    handle: Handle,
    tasks: Callable[[int], Sequence[tuple[Callable[[Run], Tensor], Callable[[Run], Tensor]]]],
    *,
    iterations: int = 60000,
    steps: int = 5,
    rate: float = 1e-2,
    meta_rate: float = 1e-3,
    block: int = 4,
    shrink: int = 2,
    second_order: bool = True,
    report: Callable[[int, float], None] | None = None,
) -> MetaAdapter:
    """Learns over tasks where an adapter's tensors should start and in which geometry a few steps adapt them.

    Args:
        handle: of the adapted model, whose trained tensors are φ.
        tasks: iteration -> a few tasks, each as two losses (support, query) of a function that runs the model:
            `lambda run: cross_entropy(run(x), y)`.
        iterations, steps, rate, meta_rate, second_order, report: see `meta_train`.
        block, shrink: of the mirror map.
    """
    learned = MetaAdapter(handle, block=block, shrink=shrink)

    def on_tensors(loss: Callable[[Run], Tensor]) -> Loss:
        return lambda phi: loss(learned.run_with(phi))

    learned.losses = meta_train(
        learned.mirror,
        learned.z0,
        lambda iteration: [(on_tensors(support), on_tensors(query)) for support, query in tasks(iteration)],
        iterations=iterations,
        steps=steps,
        rate=rate,
        meta_rate=meta_rate,
        second_order=second_order,
        report=report,
    )
    return learned
