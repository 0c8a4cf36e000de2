"""From spectra to decisions: how many ranks each layer gets, and how many directions a layer's features have.

`suggest_ranks` fills greedily: the next singular direction with the most energy s² per trained number (m + n) is bought first.
For descending spectra that is the optimum of Σ kept energy under the budget up to the last purchase. `local_rank` counts the
singular values of the Jacobian ∂h/∂x (h_l's width × inputs) above a threshold, which estimates the dimension of the features.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, did_you_mean
from rankwise.core.randomness import generator_for


def suggest_ranks(
    table: Mapping[str, Tensor], budget: int, *, shapes: Mapping[str, tuple[int, int]] | None = None, minimum: int = 0
) -> dict[str, int]:
    """Ranks per site, for `Recipe.ranks`.

    Args:
        table: site -> singular values (k,), descending.
        budget: trained numbers to spend, r (m + n) per site; without `shapes`, ranks to spend.
        shapes: site -> (m, n).
        minimum: rank that every site gets first.

    Raises:
        ArgumentError: the budget does not pay for the minimum.
    """
    cost = {site: 1 if shapes is None else sum(shapes[site]) for site in table}
    ranks = {site: min(minimum, s.numel()) for site, s in table.items()}
    left = budget - sum(cost[site] * rank for site, rank in ranks.items())
    if left < 0:
        raise ArgumentError(
            f"a budget of {budget} does not pay for rank {minimum} on {len(table)} sites, which costs {budget - left}"
        )
    heap = [_offer(site, table[site], ranks[site], cost[site]) for site in table if ranks[site] < table[site].numel()]
    heapq.heapify(heap)
    while heap:
        gain, site = heapq.heappop(heap)
        if gain >= 0.0:
            break  # nothing but zeros left to buy
        if cost[site] > left:
            continue
        ranks[site] += 1
        left -= cost[site]
        if ranks[site] < table[site].numel():
            heapq.heappush(heap, _offer(site, table[site], ranks[site], cost[site]))
    return ranks


def _offer(site: str, spectrum: Tensor, rank: int, cost: int) -> tuple[float, str]:
    return -float(spectrum[rank].double() ** 2) / cost, site


def local_rank(
    model: nn.Module, x: Tensor, layer: str, *, threshold: float = 1e-6, probes: int | None = None, seed: int = 0
) -> float:
    """The rank of ∂h/∂x at each sample, averaged; h is the layer's output for that sample alone.

    Args:
        model: in eval mode, differentiable in x.
        x: samples (N, …), floating point.
        layer: name of the module that gives h.
        threshold: singular values above it count.
        probes: random directions of a sketch (about twice the expected rank); None takes every output, exact.
        seed: of the sketch.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ArgumentError(f"no layer {layer!r} in the model. {did_you_mean(layer, modules)}")
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output)

    hook = modules[layer].register_forward_hook(keep)
    counts = []
    try:
        for index in range(x.shape[0]):
            seen.clear()
            sample = x[index : index + 1].detach().clone().requires_grad_(True)
            with torch.enable_grad():
                model(sample)
            if not seen:
                raise ArgumentError(f"the model's forward never called {layer!r}")
            h = seen[-1].reshape(-1)  # (width,)
            directions = _directions(h, probes, seed)  # (k, width)
            rows = [torch.autograd.grad(h, sample, v, retain_graph=True)[0].reshape(-1) for v in directions]
            counts.append(int((torch.linalg.svdvals(torch.stack(rows)) > threshold).sum()))
    finally:
        hook.remove()
    return sum(counts) / len(counts)


def _directions(h: Tensor, probes: int | None, seed: int) -> Tensor:
    """All unit vectors, or Gaussian ones scaled so that norms are kept on average."""
    width = h.numel()
    if probes is None or probes >= width:
        return torch.eye(width, dtype=h.dtype, device=h.device)
    drawn = torch.randn(probes, width, generator=generator_for(seed, "local rank"), dtype=torch.float64) / probes**0.5
    return drawn.to(h)
