"""Whole adapters into one: a merger applied site by site, with the exact error, and the result put onto a model.

An adapter is a mapping site -> update. A merger of one site is any callable `(updates, weights) -> Operator`. It says what else
it reads by the names of its keyword-only arguments: `rank` (of the result), `statistics` (the site's `LayerStatistics`, one per
adapter: what RegMean reads) and `generator` (private, seeded by site: what DARE draws from). Hyperparameters are bound with
`functools.partial`. Methods that look at all sites at once (IterIS, a global TIES threshold, LoraHub's search) are functions of
their own that end in `result_of`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rankwise.core.adapt import adapt_
from rankwise.core.errors import ArgumentError, MergeError, did_you_mean, shorten
from rankwise.core.handle import Handle
from rankwise.core.operators import LowRank, Operator
from rankwise.core.piece import piece
from rankwise.core.queries import as_low_rank
from rankwise.core.randomness import generator_for
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import LayerStatistics
from rankwise.merging.combination import linear, task_arithmetic
from rankwise.merging.exact import cat, svd
from rankwise.merging.operands import best, refuse_dense, relative_error
from rankwise.parameterizations.lora import LoRA
from rankwise.steps.moments import adamw

METHODS: dict[str, Callable[..., Operator]] = {
    "cat": cat,
    "svd": svd,
    "linear": linear,
    "task_arithmetic": task_arithmetic,
}
Adapter = Mapping[str, Operator]


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merge gave.

    Attributes:
        method: its name.
        operators: site -> merged update.
        errors: site -> ‖merged - Σ w_i D_i‖_F / ‖Σ w_i D_i‖_F, exact. For a method that does not aim at the sum (IterIS) it
            tells how far it went from it.
        norms: site -> ‖Σ w_i D_i‖_F.
        present: site -> how many of the adapters have the site; in the others its update is zero.
        weights: one per adapter.
        facts: what the method has to say besides (iterations, changes).
    """

    method: str
    operators: Mapping[str, Operator]
    errors: Mapping[str, float]
    norms: Mapping[str, float]
    present: Mapping[str, int]
    weights: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The relative error over all sites together."""
        total = sum(norm**2 for norm in self.norms.values()) ** 0.5
        wrong = sum((self.errors[site] * (norm if norm > 0 else 1.0)) ** 2 for site, norm in self.norms.items()) ** 0.5
        return wrong / total if total > 0 else wrong

    def rank(self, site: str) -> int | None:
        """The inner width of the merged update, None where it is dense."""
        pair = as_low_rank(self[site])
        return None if pair is None else pair.rank

    def __getitem__(self, site: str) -> Operator:
        if site not in self.operators:
            raise ArgumentError(f"the merge has no site {site!r}. {did_you_mean(site, self.operators)}")
        return self.operators[site]

    def __str__(self) -> str:
        width = max((len(site) for site in self.operators), default=4)
        lines = [
            f"{self.method} of {len(self.weights)} adapters, weights {', '.join(f'{w:g}' for w in self.weights)}: "
            f"relative error {self.error:.3g} against the exact sum"
        ]
        lines += [f"  {key}: {value}" for key, value in self.facts.items()]
        lines.append(f"  {'site':<{width}}  rank  in adapters  norm of sum  relative error")
        for site in self.operators:
            rank = self.rank(site)
            lines.append(
                f"  {site:<{width}}  {'full' if rank is None else rank:>4}  {self.present[site]:>11}  "
                f"{self.norms[site]:>11.4g}  {self.errors[site]:>14.3g}"
            )
        return "\n".join(lines)


def aligned(adapters: Sequence[Adapter]) -> dict[str, list[Operator]]:
    """Site -> one update per adapter; where an adapter lacks a site, its update there is the zero operator of rank 0.

    Raises:
        MergeError: no adapters, or updates of different shapes on one site.
    """
    if not adapters:
        raise MergeError("nothing to merge: pass at least one adapter (a mapping site -> update, such as handle.updates())")
    sites = list(dict.fromkeys(site for adapter in adapters for site in adapter))
    if not sites:
        raise MergeError("the adapters have no sites at all")
    result: dict[str, list[Operator]] = {}
    for site in sites:
        found = [adapter[site] for adapter in adapters if site in adapter]
        if len({update.shape for update in found}) > 1:
            raise MergeError(
                f"{site} has updates of shapes {[update.shape for update in found]}; the adapters belong to different bases"
            )
        pair, (m, n) = as_low_rank(found[0]), found[0].shape
        sample = found[0].dense() if pair is None else pair.B
        zero = LowRank(sample.new_zeros(m, 0), sample.new_zeros(0, n))
        result[site] = [adapter.get(site, zero) for adapter in adapters]
    return result


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str | Callable[..., Operator] = "svd",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    statistics: Sequence[Mapping[str, LayerStatistics]] | None = None,
    seed: int = 0,
) -> MergeResult:
    """Merges adapters site by site.

    Args:
        adapters: one mapping site -> update each, such as `handle.updates()`. A site that some adapters lack is merged with
            zero updates for those, and the table says so.
        method: a name of `METHODS`, or a merger of one site (see this module), hyperparameters bound with `functools.partial`.
        weights: one per adapter; None means 1 for each.
        rank: of the merged update, for mergers that take one.
        statistics: per adapter, what `collect` gave for it, for mergers that read data.
        seed: for mergers that draw numbers.

    Raises:
        MergeError: shapes differ, or an update is not of the form the method needs.
        ArgumentError: an unknown method, or an option that the method does not take.
    """
    if isinstance(method, str) and method not in METHODS:
        raise ArgumentError(f"no merger {method!r}. {did_you_mean(method, METHODS)}")
    merger = METHODS[method] if isinstance(method, str) else method
    name = method if isinstance(method, str) else getattr(getattr(merger, "func", merger), "__name__", type(merger).__name__)
    accepted = inspect.signature(merger).parameters
    for option, value in (("rank", rank), ("statistics", statistics)):
        if value is not None and option not in accepted:
            raise ArgumentError(f"{name} takes no {option}=; leave it away, or use another method")
    table = aligned(adapters)
    values = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    operators: dict[str, Operator] = {}
    for site, updates in table.items():
        options: dict[str, Any] = {} if rank is None else {"rank": rank}
        if statistics is not None:
            options["statistics"] = [known[site] for known in statistics]
        if "generator" in accepted:
            options["generator"] = generator_for(seed, site, name)
        operators[site] = merger(updates, values, **options)
    return result_of(name, adapters, operators, values)


def result_of(
    method: str,
    adapters: Sequence[Adapter],
    operators: Mapping[str, Operator],
    weights: Sequence[float],
    facts: Mapping[str, Any] | None = None,
) -> MergeResult:
    """Measures merged operators against the exact weighted sum and wraps them up."""
    table = aligned(adapters)
    measured = {site: relative_error(operator, table[site], weights) for site, operator in operators.items()}
    return MergeResult(
        method=method,
        operators=dict(operators),
        errors={site: error for site, (error, _) in measured.items()},
        norms={site: norm for site, (_, norm) in measured.items()},
        present={site: sum(site in adapter for adapter in adapters) for site in operators},
        weights=tuple(weights),
        facts=dict(facts or {}),
    )


def as_adapter(
    model: nn.Module,
    result: MergeResult | Adapter,
    name: str = "merge",
    *,
    common_rank: bool = False,
    train_also: Sequence[str] = (),
) -> Handle:
    """Puts a merge result onto a model as a plain LoRA adapter of scale 1, which can be trained, saved and exported.

    Args:
        model: the base that the adapters belong to.
        result: of `merge_adapters` or `iteris`, or any mapping site -> update with exact factors.
        name: of the new adapter.
        common_rank: give all sites the largest rank (padded with zeros) instead of each its own.
        train_also: modules kept with it as they are in the model (a classification head), as for `adapt_`.

    Raises:
        MergeError: a site is not in the model, or an update has no exact factors.
    """
    operators = result.operators if isinstance(result, MergeResult) else result
    modules = dict(model.named_modules())
    missing = [site for site in operators if site not in modules]
    if missing or not operators:
        raise MergeError(
            f"{len(missing)} of the {len(operators)} merged sites are not layers of this model "
            f"({shorten(missing) or 'no sites'}); put the result onto the base that the adapters were trained on"
        )
    pairs: dict[str, LowRank] = {}
    for position, (site, operator) in enumerate(operators.items()):
        pair = as_low_rank(operator)
        if pair is None:
            refuse_dense(operator, position)
        # More ranks than the layer has say nothing more; the decomposition is exact there.
        pairs[site] = best(operator, min(operator.shape))[0] if pair.rank > min(operator.shape) else pair.folded()
    widest = max(1, *(pair.rank for pair in pairs.values()))
    if common_rank and any(widest > min(pair.shape) for pair in pairs.values()):
        raise MergeError(f"a common rank of {widest} does not fit every layer; leave common_rank=False, or merge with rank=")
    ranks = {site: widest if common_rank else max(1, pair.rank) for site, pair in pairs.items()}
    different = {site: rank for site, rank in ranks.items() if rank != widest}
    recipe = Recipe(name="lora", parameterization=piece(LoRA, rank=widest), step=(piece(adamw),), ranks=different)
    handle = adapt_(model, recipe, where=lambda candidate, _: candidate in pairs, name=name, train_also=train_also)
    with torch.no_grad():
        for site, pair in pairs.items():
            _fill(handle.parameterization(site), pair)
    return handle


def _fill(entry: Any, pair: LowRank) -> None:
    """Loads factors into a layer's adapter of at least their rank, the rest zero."""
    B, A = torch.zeros_like(entry.B), torch.zeros_like(entry.A)  # (m, r), (r, n)
    B[:, : pair.rank], A[: pair.rank] = pair.B.to(B), pair.A.to(A)
    entry.load_factors(LowRank(B, A))
