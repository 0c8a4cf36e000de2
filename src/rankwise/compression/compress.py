"""`compress_`: replaces layers of a model by two thin ones, through any approximation that gives a product B A."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rankwise.approximations.weighted_svd import root_of, weighted_spectrum
from rankwise.compression.factorized import Factorized, factorized
from rankwise.compression.report import CompressionReport, LayerReport
from rankwise.core.bypass import bypass_of
from rankwise.core.errors import ArgumentError, StatisticsError, TargetError, did_you_mean, shorten
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PRODUCT
from rankwise.core.protocols import Approximation
from rankwise.core.randomness import generator_for
from rankwise.core.statistics import LayerStatistics, Statistic
from rankwise.core.targets import Target, Where, find_targets, tied_with


def rank_for(m: int, n: int, keep: float) -> int:
    """The largest r with r(m + n) ≤ keep · mn numbers."""
    return math.floor(keep * m * n / (m + n) + 1e-9)


def compress_(
    model: nn.Module,
    approximation: Approximation,
    *,
    keep: float | None = None,
    rank: int | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    where: Where = "all-linear",
    skip: Sequence[str] = (),
    seed: int = 0,
) -> CompressionReport:
    """Replaces layers by factorized ones, in place.

    Args:
        model: any module without adapters on the chosen layers.
        approximation: `SVDLLM()`, `PiSSA()` (the plain truncated SVD), or any other that gives a product.
        keep: part of each weight's numbers to keep; r = ⌊keep · mn / (m + n)⌋. Either this or `rank`.
        rank: the same rank for every layer.
        statistics: what `collect(model, batches, approximation.needs, where)` gave.
        where: as for `adapt_`.
        skip: names of layers to leave as they are.
        seed: for approximations that draw numbers.

    Raises:
        ArgumentError: neither or both of keep and rank, a rank that a layer cannot have, or a start that only trains.
        TargetError: a name matches nothing, or a layer cannot be replaced.
        StatisticsError: statistics that the approximation needs were not collected.
    """
    targets, skipped = choose(model, where, skip)
    ranks = _ranks(targets, keep, rank)
    if approximation.kind != PRODUCT or approximation.shifted:
        raise ArgumentError(
            f"{type(approximation).__name__} is a start for training (B = 0, or a step away from the weight) and gives no "
            "product that could stand for a weight; use SVDLLM or PiSSA"
        )
    known = _statistics(targets, statistics, approximation)
    before = sum(parameter.numel() for parameter in model.parameters())
    made: dict[str, Factorized] = {}
    reports = []
    for site, target in targets.items():  # everything is computed before anything is replaced
        factors = approximation(known[site], ranks[site], generator=generator_for(seed, site, "compress"))
        made[site] = factorized(target, factors)
        reports.append(_report(target, known[site], made[site].low_rank()))
    for site, target in targets.items():
        replace(model, target.module, made[site])
    after = sum(parameter.numel() for parameter in model.parameters())
    return CompressionReport(
        method=type(approximation).__name__,
        layers=tuple(reports),
        parameters_before=before,
        parameters_after=after,
        skipped=skipped,
    )


def choose(model: nn.Module, where: Where, skip: Sequence[str] = ()) -> tuple[dict[str, Target], dict[str, str]]:
    """The layers to replace, and what is left out with the reason.

    Raises:
        TargetError: a name in skip matches nothing, nothing is left, or a layer cannot be replaced.
    """
    targets, left_out = find_targets(model, where)
    skipped = dict(left_out)
    for name in [skip] if isinstance(skip, str) else skip:
        found = [site for site in targets if site == name or site.endswith(f".{name}")]
        if not found:
            raise TargetError(f"skip={list(skip)!r}: {name!r} is none of the chosen layers. {did_you_mean(name, targets)}")
        for site in found:
            del targets[site]
            skipped[site] = "named in skip="
    if not targets:
        raise TargetError(f"skip={list(skip)!r} leaves no layer to compress")
    for site, target in targets.items():
        if "adapter" in target.module._modules:
            raise TargetError(
                f"{site} carries an adapter; merge it and take it off (handle.merge_, handle.detach_) before compressing"
            )
        others = tied_with(model, site)
        if others:
            raise TargetError(
                f"{site}.weight is the same tensor as {shorten(others)}; replacing it would untie them and make the model "
                f"larger. Leave it out with skip=[{site!r}]"
            )
        reason = bypass_of(model, site)
        if reason is not None:
            raise TargetError(f"{site}: {reason}; use skip=[{site!r}]")
    return targets, skipped


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in another's place, wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _ranks(targets: Mapping[str, Target], keep: float | None, rank: int | None) -> dict[str, int]:
    if (keep is None) == (rank is None):
        raise ArgumentError(f"give either keep= or rank=, not {'both' if rank is not None else 'neither'}")
    if keep is not None and not 0 < keep <= 1:
        raise ArgumentError(f"keep is the part of the numbers to keep, in (0, 1], not {keep}")
    ranks = {
        site: rank_for(target.m, target.n, keep) if keep is not None else int(rank or 0) for site, target in targets.items()
    }
    for site, target in targets.items():
        if not 1 <= ranks[site] <= min(target.m, target.n):
            said = f"keep={keep:g} gives" if keep is not None else "this is"
            raise ArgumentError(
                f"{site} is {target.m}×{target.n} and has ranks 1 to {min(target.m, target.n)}; {said} rank {ranks[site]}. "
                f"Choose another value, or leave the layer out with skip=[{site!r}]"
            )
    return ranks


def _statistics(
    targets: Mapping[str, Target], statistics: Mapping[str, LayerStatistics] | None, approximation: Approximation
) -> dict[str, LayerStatistics]:
    if statistics is None:
        if approximation.needs - {Statistic.WEIGHT}:
            needed = ", ".join(sorted(item.value for item in approximation.needs))
            raise StatisticsError(
                f"{type(approximation).__name__} needs {needed}; pass "
                "statistics=rankwise.collect(model, batches, approximation.needs)"
            )
        return {site: LayerStatistics(site, target.matrix()) for site, target in targets.items()}
    missing = [site for site in targets if site not in statistics]
    if missing:
        raise StatisticsError(f"statistics hold nothing for {shorten(missing)}; call collect with the same where=")
    return {site: statistics[site] for site in targets}


@torch.no_grad()
def _report(target: Target, known: LayerStatistics, stored: LowRank) -> LayerReport:
    W = known.weight.double()  # (m, n)
    F = None if known.inputs is None else root_of(known.inputs.gram).to(W.device)  # (n, n)
    spectrum = weighted_spectrum(W, F)  # (k,)
    residual = W - stored.B.double() @ stored.A.double()  # (m, n)
    return LayerReport(
        site=target.name,
        m=target.m,
        n=target.n,
        rank=stored.rank,
        parameters_before=W.numel(),
        parameters_after=stored.rank * (target.m + target.n),
        error=float((residual if F is None else residual @ F).norm()),
        predicted=float(spectrum[stored.rank :].square().sum().sqrt()),
        size=float(spectrum.square().sum().sqrt()),
        basis="weights" if F is None else "pooled" if getattr(target.module, "groups", 1) > 1 else "outputs",
    )
