"""Which layers would be faster as two small ones, measured by running them: Cuttlefish's choice of layers to factorize.

Each linear and convolution layer is timed on the input it meets in the model, whole and as its channel chain of rank
`ratio` · min(m, n); those that become `speedup` times faster are worth it. Small and early layers are usually not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.compression.factorized import factorized
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.core.targets import Target, find_targets, is_quantized
from rankwise.core.training import evaluating


def slow_layers(model: nn.Module, batch: Any, ratio: float = 0.25, speedup: float = 1.5, *, repeats: int = 20) -> list[str]:
    """Names of the layers that become at least `speedup` times faster as two of rank `ratio` · min(m, n).

    Args:
        model: without adapters.
        batch: a mapping for `model(**batch)`, a pair (inputs, …), or the input itself.
        ratio: of the rank that is tried.
        speedup: the least that is worth it.
        repeats: timed runs of each layer, of which the fastest counts.

    Raises:
        ArgumentError: ratio is not in (0, 1], or a number is not positive.
    """
    if not 0 < ratio <= 1 or speedup <= 0 or repeats < 1:
        raise ArgumentError(f"ratio is in (0, 1], speedup and repeats are positive; they are {ratio}, {speedup}, {repeats}")
    targets, _ = find_targets(model, "all-layers")
    inputs = _inputs(model, batch, targets)
    chosen = []
    for site, x in inputs.items():
        target, layer = targets[site], targets[site].module
        small = factorized(target, _zeros(target, max(1, round(ratio * min(target.m, target.n)))))
        if _seconds(layer, x, repeats) >= speedup * _seconds(small, x, repeats):
            chosen.append(site)
    return chosen


def _zeros(target: Target, rank: int) -> LowRank:
    weight = target.parameter()
    return LowRank(weight.new_zeros(target.m, rank), weight.new_zeros(rank, target.n))


@torch.no_grad()
def _inputs(model: nn.Module, batch: Any, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The input each layer meets first, of those that run and hold ordinary numbers."""
    found: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: None if site in found else found.update({site: arguments[0].detach()})

    hooks = [t.module.register_forward_pre_hook(keep(site)) for site, t in targets.items() if not is_quantized(t.module)]
    try:
        with evaluating(model):
            model(**batch) if isinstance(batch, Mapping) else model(batch[0] if isinstance(batch, tuple | list) else batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _seconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    """The fastest of some runs, behind one to warm up."""
    layer(x)
    best = float("inf")
    for _ in range(repeats):
        _finish(x)
        begin = time.perf_counter()
        layer(x)
        _finish(x)
        best = min(best, time.perf_counter() - begin)
    return best


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
