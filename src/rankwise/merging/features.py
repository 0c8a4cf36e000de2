"""Inputs of layers while a model runs with given updates, nothing written into it: what mergers that read data need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bindings import adapted_layers, switched_off
from rankwise.core.errors import ArgumentError, MergeError, StatisticsError, shorten
from rankwise.core.operators import LowRank, Operator
from rankwise.core.statistics import MomentCollector, kept_rows, token_mask
from rankwise.core.targets import Target, find_targets


def sites_of(model: nn.Module, sites: Iterable[str]) -> dict[str, Target]:
    """The layers of the given names, whose weights must be the untouched ones.

    Raises:
        MergeError: a site is not in the model, or something is merged or absorbed into a weight.
    """
    wanted = set(sites)
    missing = sorted(wanted - {name for name, _ in model.named_modules()})
    if missing:
        raise MergeError(f"{shorten(missing)} are no layers of this model; pass the base that the adapters were trained on")
    changed = [name for name, _, adapters in adapted_layers(model) if adapters.stash is not None and name in wanted]
    if changed:
        raise MergeError(
            f"the weights of {shorten(changed)} are not the untouched ones (an adapter is merged, or its start was absorbed); "
            "unmerge_() or detach_() it first, or pass a fresh copy of the base"
        )
    return find_targets(model, lambda name, _: name in wanted)[0]


def inputs_with(
    model: nn.Module, targets: Mapping[str, Target], updates: Mapping[str, Operator], batch: Any, *, mask: bool
) -> dict[str, Tensor]:
    """Runs one batch through base + updates and returns each site's input rows (tokens, n) in float64.

    Sites that read the same tensor share one result. With `mask`, padded tokens (attention_mask 0) are dropped.
    """
    padding = token_mask(batch) if mask else None
    seen: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    found: dict[str, Tensor] = {}
    hooks = [
        target.module.register_forward_hook(_hook(site, target, updates.get(site), padding, seen, found))
        for site, target in targets.items()
    ]
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    silent = [site for site in targets if site not in found]
    if silent:
        raise StatisticsError(
            f"the forward of a batch never called {shorten(silent)}; leave these sites out, or change the batch"
        )
    return found


def _hook(
    site: str, target: Target, update: Operator | None, padding: Tensor | None, seen: dict[Any, Any], found: dict[str, Tensor]
) -> Any:
    def receive(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x = inputs[0]
        key = (id(x), x._version, target.layout)
        if key not in seen:  # x is kept beside its rows, so that its id is not given to another tensor
            seen[key] = (x, kept_rows(target.layout.input_rows(x), x, padding).detach().to("cpu", torch.float64, copy=True))
        rows = seen[key][1]  # (tokens, n)
        found[site] = torch.cat([found[site], rows]) if site in found else rows
        empty = update is None or (isinstance(update, LowRank) and not update.rank)  # an adapter without this site
        return None if update is None or empty else update.add_to(output, x, target.layout)

    return receive


def moments(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Any],
    source: Mapping[str, Operator],
    merged: Mapping[str, Operator] | None,
    *,
    blend: float = 0.0,
    mask: bool = True,
) -> dict[str, MomentCollector]:
    """Streams Σ x̃ x̃ᵀ (`gram`) and Σ x̃ xᵀ (`cross`) of every site: x under `source`, x̃ under `merged` (None: x̃ = x).

    Each batch is replayed through both, so that only the (n, n) sums are kept. Sites with the same inputs share a collector.

    Args:
        model: the base, any adapters on it are switched off for the while.
        targets: the layers.
        batches: of one task.
        source: site -> update of the adapter that belongs to the task.
        merged: site -> merged update so far.
        blend: ρ in x̃ <- (1 - ρ) x̃ + ρ x.
        mask: drop padded tokens.
    """
    kept: dict[tuple[str, ...], MomentCollector] = {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), switched_off(model):
            for batch in batches:
                first = inputs_with(model, targets, source, batch, mask=mask)
                second = first if merged is None else inputs_with(model, targets, merged, batch, mask=mask)
                groups: dict[tuple[int, int], list[str]] = {}
                for site in targets:
                    groups.setdefault((id(first[site]), id(second[site])), []).append(site)
                for sites in groups.values():
                    x, z = first[sites[0]], second[sites[0]]
                    if tuple(sites) not in kept:
                        kept[tuple(sites)] = MomentCollector(x.shape[1], x.shape[1])
                    kept[tuple(sites)].add((1 - blend) * z + blend * x if blend and merged is not None else z, x)
    finally:
        model.train(training)
    if not kept:
        raise StatisticsError("a task has no batches; pass at least one per adapter")
    return {site: _total([collector for sites, collector in kept.items() if site in sites]) for site in targets}


def _total(parts: list[MomentCollector]) -> MomentCollector:
    """The sum of collectors; one alone is shared, not copied."""
    if len(parts) == 1:
        return parts[0]
    width = parts[0].total.shape[0]
    total = MomentCollector(width, width)
    for part in parts:
        total.count += part.count
        total.total += part.total
        total.gram += part.gram
        if total.cross is not None and part.cross is not None:
            total.cross += part.cross
    return total


def run(model: nn.Module, batch: Any) -> Any:
    """The forward of a batch: a mapping of keywords, a pair (inputs, targets), or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch if isinstance(batch, Tensor) else batch[0])


def replayable(batches: Any, what: str) -> Any:
    """Refuses an iterator, which could be gone through only once."""
    if iter(batches) is batches:
        raise ArgumentError(f"{what} is an iterator, which is empty after one pass; pass a list, or a DataLoader")
    return batches
