"""The order in which a model runs its layers, so that what is measured behind a changed layer is measured after the change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import StatisticsError, shorten


@torch.no_grad()
def run(model: nn.Module, batch: Any) -> None:
    """One forward in eval mode, no gradients: `model(**batch)`, or the inputs of a pair."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        model(**batch) if isinstance(batch, Mapping) else model(batch[0])
    finally:
        for module, training in flags:
            module.training = training


def watched(modules: Mapping[str, nn.Module], receive: Callable[[str, Tensor, Tensor], None]) -> list[Any]:
    """Hooks that pass (site, input, output) of every call of these modules to `receive`."""

    def hook_for(site: str) -> Any:
        return lambda _, inputs, output: receive(site, inputs[0], output)

    return [module.register_forward_hook(hook_for(site)) for site, module in modules.items()]


def execution_groups(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> list[list[str]]:
    """Sites in the order of their first call; those that read the same tensor stand together (q, k, v).

    Raises:
        StatisticsError: the batch does not reach some of them.
    """
    groups: list[tuple[Tensor, list[str]]] = []  # the tensors are held so that no address is used twice
    seen: set[str] = set()

    def receive(site: str, x: Tensor, _: Tensor) -> None:
        if site in seen:
            return
        seen.add(site)
        for tensor, group in groups:
            if tensor is x:
                group.append(site)
                return
        groups.append((x, [site]))

    hooks = watched(modules, receive)
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [site for site in modules if site not in seen]
    if missing:
        raise StatisticsError(f"the first batch does not reach {shorten(missing)}; leave them out, or put such a batch first")
    return [group for _, group in groups]


def as_list(batches: Iterable[Any]) -> Sequence[Any]:
    """The batches as something that can be gone through again and again.

    Raises:
        StatisticsError: there are none.
    """
    kept = batches if isinstance(batches, Sequence) else list(batches)
    if not len(kept):
        raise StatisticsError("no batches were given; pass at least one")
    return kept
