"""Number 5 of the list: no option is stored and never used. Every argument of every recipe changes what training gives, or is
refused. Generated from the signatures of the catalog: an argument without a case here fails."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.checkpoint import trained_tensors
from rankwise.core.errors import ArgumentError, RecipeError, StatisticsError
from rankwise.core.piece import SHELVES
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import Statistic
from tests.never_silent.arguments import ANYWHERE, CASES, ELSEWHERE, MEMORY, REFUSED, WITHOUT_EFFECT

RECIPES = [slug for shelf in SHELVES for slug in rankwise.catalog.names(shelf)]
ARGUMENTS = [(slug, name) for slug in RECIPES for name in inspect.signature(rankwise.catalog.entry(slug).make).parameters]
ARGUMENTS = [case for case in ARGUMENTS if case not in ELSEWHERE]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16)]
        return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 4, 4, 4, generator=generator, dtype=torch.float64) + 0.5
    return x, torch.randint(16, (9,), generator=generator)


_collected: dict[bool, Any] = {}


KINDS = {"0": "conv", "3": "linear", "5": "linear"}


def where_of(*recipes: Recipe) -> list[str]:
    """The layers that all of the methods work on, the convolution if they can: its kernel has arguments of its own."""
    layouts = [recipe.parameterization.factory.facts.layouts for recipe in recipes]
    return [site for site, kind in KINDS.items() if all(kind in known for known in layouts)]


def observed(recipe: Recipe, where: list[str]) -> dict[str, Tensor]:
    """Everything a user can see after training a little: trained tensors, the weights, the outputs in both modes."""
    net, (x, y) = network(), data()
    if not _collected:
        needs = {Statistic.GRADIENT, Statistic.INPUT_GRAM}
        _collected[True] = rankwise.collect(net, [(x, y)], needs, where=list(KINDS))
    handle = rankwise.adapt_(net, recipe, where=where, statistics=_collected[True])
    optimizer = handle.optimizer(lr=3e-2)
    own = getattr(handle.procedure, "loss", None)  # a procedure that makes the loss itself, from inputs in [0, 1]

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(x), y) if own is None else own(net, x.sigmoid(), y)

    for _ in range(8):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    found = {f"file/{key}": tensor.detach().clone() for key, tensor in trained_tensors(handle).items()}
    found |= {f"weight/{site}": net.get_submodule(site).weight.detach().clone() for site in handle.targets}
    found |= {"train": net(x).detach(), "eval": net.eval()(x).detach()}
    return found


def largest_allocation(recipe: Recipe) -> int:
    """Bytes of the largest tensor made by one forward and backward."""
    net, (x, y) = network(), data()
    rankwise.adapt_(net, recipe, where=where_of(recipe))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        nn.functional.cross_entropy(net(x), y).backward()
    return max(event.self_cpu_memory_usage for event in seen.events() or ())


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    if {key: tensor.shape for key, tensor in one.items()} != {key: tensor.shape for key, tensor in other.items()}:
        return True
    return any(float((one[key].double() - other[key].double()).abs().max()) > 1e-9 for key in one if one[key].numel())


@functools.cache
def earlier(seed: int) -> str:
    """A folder with an earlier adapter of the network, and of another layer that is alike."""
    net = network()
    net.add_module("more", nn.ModuleDict({"3": nn.Linear(6, 24)}).double())
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=2), where=["0", "3", "5"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return str(handle.save(Path(mkdtemp(prefix="rankwise-earlier-"))))


def built(slug: str, arguments: dict[str, Any]) -> Recipe:
    """The recipe, a perturbation, schedule or step on what it needs."""
    made = {key: rankwise.catalog.entry(value).make() if key == "inner" else value for key, value in arguments.items()}
    for key, value in made.items():
        if isinstance(value, tuple) and "SOURCES" in value:
            made[key] = tuple(earlier(seed) for seed, _ in enumerate(value))
    beside = made.pop("beside", None)  # a method to compose it with, since the argument matters only then
    recipe = rankwise.catalog.entry(slug).make(**made)
    return recipe if beside is None else rankwise.compose(recipe, beside)


@pytest.mark.parametrize(("slug", "name"), ARGUMENTS)
def test_05_every_argument_has_an_effect(slug: str, name: str) -> None:
    kept = rankwise.catalog.entry(slug)
    assert (slug, name) in CASES or name in ANYWHERE, f"add a case for {slug}({name}=…)"
    context, value = CASES.get((slug, name)) or ANYWHERE[name]
    arguments = {**kept.tiny, **context}
    assert arguments.get(name, object()) != value
    recipe, other = built(slug, arguments), built(slug, {**arguments, name: value})
    where = where_of(recipe, other)
    before = observed(recipe, where)
    assert not differ(before, observed(built(slug, arguments), where)), "the same recipe twice gives the same"
    if (slug, name) in REFUSED:
        with pytest.raises(StatisticsError):
            observed(other, where)
        return
    if (slug, name) in MEMORY:
        assert not differ(before, observed(other, where))
        assert largest_allocation(other) < largest_allocation(built(slug, arguments)) / 2
        return
    assert differ(before, observed(other, where)), f"{slug}({name}={value!r}) changes nothing"


def test_every_case_names_an_argument() -> None:
    there = {(slug, name) for slug in RECIPES for name in inspect.signature(rankwise.catalog.entry(slug).make).parameters}
    assert (set(CASES) | ELSEWHERE) <= there


@pytest.mark.parametrize("text", WITHOUT_EFFECT)
def test_05_an_argument_that_could_have_no_effect_is_refused(text: str) -> None:
    with pytest.raises((ArgumentError, RecipeError)):
        recipe = rankwise.compose(text)
        observed(recipe, where_of(recipe))
