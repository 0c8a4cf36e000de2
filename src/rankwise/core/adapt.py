"""`adapt_` and `collect`: from a model, a recipe and statistics to a handle."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.core import merge
from rankwise.core.bank import Bank, attach_bank, detach_bank
from rankwise.core.bindings import TAKEN_NAMES, Adapters, activate_, adapted_layers, attach, detach
from rankwise.core.bypass import bypass_of
from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError, RecipeError, TargetError, did_you_mean, shorten
from rankwise.core.fingerprint import fingerprint_of
from rankwise.core.freezing import freeze, thaw
from rankwise.core.handle import Handle
from rankwise.core.operators import LowRank
from rankwise.core.parameterization import PAIR, PRODUCT, Parameterization, Site
from rankwise.core.piece import Piece
from rankwise.core.protocols import Approximation, Replacing
from rankwise.core.queries import as_low_rank
from rankwise.core.randomness import MaskStream
from rankwise.core.recipe import Recipe
from rankwise.core.sites import site_of
from rankwise.core.statistics import LayerStatistics, Statistic, collect_at, default_loss
from rankwise.core.step import Step
from rankwise.core.targets import Target, Where, find_targets, is_quantized

Statistics = Mapping[str, LayerStatistics]


def adapt_(
    model: nn.Module,
    recipe: Recipe,
    where: Where = "all-linear",
    statistics: Statistics | None = None,
    name: str = "default",
    seed: int = 0,
    *,
    train_also: Sequence[str] = (),
    binding: str = "path",
) -> Handle:
    """Freezes the model and puts an adapter into it, in place.

    Args:
        model: any module. Its weights stay as they are, its keys too; adapters are children `<layer>.adapter`.
        recipe: from `rankwise.catalog` or `rankwise.compose`.
        where: "all-linear" (every linear layer but the output head of a language model), "all-conv", "all-layers", names, or a
            predicate (name, module) -> bool. A name that matches nothing is an error.
        statistics: what `collect(model, batches, recipe.needs)` gave, for starts that read data.
        name: of the adapter; several can live on one model, the newest acts.
        seed: of every random number of this adapter.
        train_also: modules trained whole beside the adapter and saved with it (a new classification head).
        binding: "path", or "weight" for weights that are read without calling the layer.

    Raises:
        TargetError: nothing to adapt, or a name that matches nothing.
        RecipeError: the recipe is illegal here; holds every reason.
        ArgumentError: the adapter's name is taken or not usable.
    """
    return build_(model, recipe, where, statistics, name, seed, train_also=train_also, binding=binding)


def build_(
    model: nn.Module,
    recipe: Recipe,
    where: Where,
    statistics: Statistics | None,
    name: str,
    seed: int,
    *,
    train_also: Sequence[str],
    binding: str,
    stored: Mapping[str, Any] | None = None,
) -> Handle:
    """`adapt_`, and with `stored`, the description in a checkpoint, an adapter whose tensors will be filled from the file."""
    _check_name(model, name)
    if binding not in ("path", "weight"):
        raise ArgumentError(f"binding is 'path' or 'weight', not {binding!r}")
    auxiliary = _auxiliary(model, train_also)
    targets, skipped = find_targets(model, where, exclude=train_also)
    _check_paths(model, targets, binding)
    masks = MaskStream(seed)
    blank = stored is not None
    sites = {site: dataclasses.replace(site_of(target, seed, masks), blank=blank) for site, target in targets.items()}
    filled = blank or (statistics is None and not recipe.needs)
    collected = set(Statistic) if filled else _collected(statistics, sites)
    problems = recipe.problems(list(sites.values()), collected)
    if problems:
        raise RecipeError(recipe.name, problems)
    fingerprint = fingerprint_of(model, targets)
    freeze(model, auxiliary)
    done: list[Target] = []
    try:
        bank = _shared(recipe, list(sites.values()), stored)
        if bank is not None:
            attach_bank(model, name, bank)
        for site, target in targets.items():
            known = None if statistics is None else statistics[site]
            here = dataclasses.replace(sites[site], bank=bank, statistics=known)
            method: Any = recipe.method
            entry: Parameterization = method(here, **recipe.arguments_at(site))
            attach(target, name, entry, binding=binding)
            done.append(target)
            _start(model, recipe, target, name, here)
    except BaseException:
        for target in done:
            merge.restore_site(target)
            detach(target, name)
        detach_bank(model, name)
        thaw(model)
        raise
    activate_(model, name)
    return Handle(
        model,
        recipe,
        name=name,
        seed=seed,
        targets=targets,
        skipped=skipped,
        auxiliary=auxiliary,
        fingerprint=fingerprint,
        masks=masks,
    )


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    needs: Iterable[Statistic],
    where: Where = "all-linear",
    *,
    loss: Callable[[nn.Module, Any], Tensor] = default_loss,
    train_also: Sequence[str] = (),
) -> dict[str, LayerStatistics]:
    """Gathers statistics of the layers to adapt, in one streamed pass over `batches`.

    Args:
        model: the model before `adapt_`.
        batches: mappings for `model(**batch)` (an attention_mask keeps padding out), or pairs (inputs, targets).
        needs: `recipe.needs`.
        where: the same as for `adapt_`.
        loss: gives the scalar loss of a batch, for GRADIENT. Default: `model(**batch).loss`, or cross entropy for pairs.
        train_also: the same as for `adapt_`.

    Returns:
        site name -> `LayerStatistics`.

    Raises:
        StatisticsError: no batches, no loss, or a layer that the loss does not depend on.
    """
    targets, _ = find_targets(model, where, exclude=train_also)
    return collect_at(model, targets, batches, needs, loss=loss)


def problems(
    model: nn.Module,
    recipe: Recipe,
    where: Where = "all-linear",
    statistics: Statistics | None = None,
    *,
    train_also: Sequence[str] = (),
) -> list[Any]:
    """Every reason why `adapt_` would refuse, without touching the model; empty means legal."""
    targets, _ = find_targets(model, where, exclude=train_also)
    sites = {site: site_of(target, 0, MaskStream(0)) for site, target in targets.items()}
    return recipe.problems(list(sites.values()), _collected(statistics, sites) if statistics is not None else None)


def steps_with(recipe: Recipe, overrides: Mapping[str, Any]) -> list[Step]:
    """The recipe's chain of steps with some arguments replaced; each must belong to a step of the chain."""
    used: set[str] = set()
    built = []
    known: set[str] = set()
    for part in recipe.step:
        accepted = {p.name for p in inspect.signature(part.factory).parameters.values() if p.kind is p.KEYWORD_ONLY}
        mine = {key: value for key, value in overrides.items() if key in accepted}
        used |= set(mine)
        known |= accepted
        built.append(Piece(part.shelf, part.name, {**part.arguments, **mine}).build())
    for key in overrides:
        if key not in used:
            raise ArgumentError(f"no step of {recipe.name!r} has an argument {key!r}. {did_you_mean(key, known)}")
    return built


def _check_name(model: nn.Module, name: str) -> None:
    if name in TAKEN_NAMES or hasattr(Adapters, name):
        raise ArgumentError(
            f"{name!r} cannot be an adapter's name, since rankwise uses it itself; add a letter: {name + '_1'!r}"
        )
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ArgumentError(f"{name!r} cannot be an adapter's name; use letters, digits and _ (it becomes part of keys)")
    taken = sorted({other for _, _, adapters in adapted_layers(model) for other in adapters})
    if name in taken:
        raise ArgumentError(
            f"an adapter named {name!r} is on this model already (there are: {', '.join(taken)}); choose another name=, or "
            "take the old one off with its handle's detach_()"
        )


def _check_paths(model: nn.Module, targets: Mapping[str, Target], binding: str) -> None:
    for site, target in targets.items():
        if binding == "weight" and is_quantized(target.module):
            raise TargetError(f"{site} is quantized, and binding='weight' needs ordinary numbers there; use binding='path'")
        reason = bypass_of(model, site) if binding == "path" else None
        if reason is not None:
            raise TargetError(f"{site}: {reason}, so an adapter on its path would be wrong; use binding='weight'")


def _auxiliary(model: nn.Module, train_also: Sequence[str]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for wanted in train_also:
        if wanted not in modules:
            raise TargetError(f"train_also={list(train_also)!r}: {wanted!r} is no module. {did_you_mean(wanted, modules)}")
        inside = {f"{wanted}.{key}": parameter for key, parameter in modules[wanted].named_parameters()}
        if not inside:
            raise TargetError(f"train_also: {wanted!r} has no parameters to train")
        found |= inside
    ordered: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # in the model's order; a tied tensor once
        if name in found and not any(parameter is other for other in ordered.values()):
            ordered[name] = parameter
    return ordered


def _collected(statistics: Statistics | None, sites: Mapping[str, Site]) -> set[Statistic]:
    if statistics is None:
        return set()
    missing = [site for site in sites if site not in statistics]
    if missing:
        raise TargetError(
            f"statistics hold nothing for {shorten(missing)}; call collect with the same where= as adapt_ "
            f"(it has {len(statistics)} sites, adapt_ found {len(sites)})"
        )
    some = next(iter(statistics.values()))
    held = {Statistic.GRADIENT: some.gradient, Statistic.INPUT_GRAM: some.inputs, Statistic.OUTPUT_GRAM: some.outputs}
    return {statistic for statistic, value in held.items() if value is not None} | {Statistic.WEIGHT}


def _shared(recipe: Recipe, sites: Sequence[Site], stored: Mapping[str, Any] | None) -> Bank | None:
    """The tensors that sites share; those of a file are read from it, unless they are to be drawn from its seed."""
    described = None if stored is None else stored.get("bank")
    if described is not None and described.get("seed") is None:
        return Bank.blank(described, sites[0].zeros(1))
    return recipe.method.shared(sites, **recipe.parameterization.arguments)


def _start(model: nn.Module, recipe: Recipe, target: Target, name: str, site: Site) -> None:
    """Puts the start in, and sees to it that the first forward equals the base unless the method says otherwise."""
    if recipe.start is None:
        return
    start: Approximation = recipe.start.build()
    adapters: Any = target.module._modules["adapter"]
    entry: Parameterization = adapters[name]
    if site.blank:
        if start.mode == "simulated":
            blank = cast(Replacing, start).blank(site.m, site.n, entry.rank)
            entry.replacement = blank.to(device=site.device, dtype=site.dtype)
        return
    if start.mode in ("absorb", "simulated"):
        merge.refuse_tied(model, target)
    known = site.statistics or LayerStatistics(site.name, site.weight())
    if is_quantized(target.module):
        known = dataclasses.replace(known, frozen=site.weight())
    chance = site.generator("approximation")
    with torch.no_grad():
        if start.mode == "simulated":
            factors, replacement = cast(Replacing, start).with_base(known, entry.rank, generator=chance, scale=entry.scale)
            merge.replace_site(target, name, replacement.to(site.device))
            merge.report_rounding(target)
        else:
            factors = start(known, entry.rank, generator=chance, scale=entry.scale)
        entry.load_factors(LowRank(site.cast(factors.B), site.cast(factors.A)))
        if start.kind in (PRODUCT, PAIR) and start.mode in ("offset", "absorb") and not start.shifted:
            placed = as_low_rank(entry.update())
            if placed is None:
                raise TypeError(f"{type(entry).__name__} holds a start without factors; this is a bug in rankwise")
            minus = LowRank(-placed.folded().B.detach(), placed.A.detach())
            if start.mode == "absorb":
                merge.absorb_site(target, name, minus)
                merge.report_rounding(target)
            else:
                entry.carry(minus, absorbed=False)
        carried = entry.carried()
        # Another adapter may be merged into the weight; only what this one absorbed belongs to its base.
        base = adapters.base(target.module) if entry.absorbed else adapters.untouched(target.module)
        entry.refresh(base if carried is None or entry.absorbed else Sum(base, carried))
