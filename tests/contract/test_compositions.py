"""Pieces of all shelves composed: legal and trains and merges, or refused with reasons. No third outcome.

Everything comes from the catalog, so a new method is tried with every other one. Each pair of pieces is run: a legal one adapts
a small problem, its loss falls, and merging gives the adapted forward; an illegal one is refused before anything is touched, by
problems that name what is needed, what is there, and the way out. Of the full product, a seeded sample is checked for legality
(what is made of legal pairs is legal) and a smaller one is trained.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import RecipeError
from rankwise.core.statistics import Statistic

SITES = ["0", "2"]
STEP_COUNT = 6
SAMPLED, TRAINED = 120, 3  # compositions of the full product, per parameterization


def texts(shelf: str) -> list[str]:
    """Every entry of a shelf with its tiny arguments, and its variants."""
    entries = [rankwise.catalog.entry(slug) for slug in rankwise.catalog.names(shelf)]
    return [text for entry in entries for text in (entry.small, *entry.variants)]


def owns_parameterization(text: str) -> bool:
    """Whether a method of another shelf brings a parameterization that it cannot do without."""
    return "parameterization" in rankwise.compose(text).own


PARAMETERIZATIONS = [
    text
    for text in [*texts("parameterization"), *filter(owns_parameterization, texts("procedure"))]
    if "linear" in rankwise.compose(text).method.facts.layouts
]
OTHERS = {
    shelf: [text for text in texts(shelf) if not owns_parameterization(text)]
    for shelf in ("start", "step", "perturbation", "schedule", "procedure")
}
# A host for pairs of other pieces: one that trains what they need.
HOSTS = {"schedule": "gated_lora(rank=2, form='sora')"}


@dataclass
class Problem:
    """A small regression whose target is the base plus a low-rank change of the first layer."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()


def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
        change = torch.outer(torch.randn(8, generator=generator), torch.randn(8, generator=generator)).double() * 0.4
        weight = model[0].weight.clone()
        model[0].weight.add_(change)
        y = model(x)
        model[0].weight.copy_(weight)
    return Problem(model, x, y)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@functools.cache
def statistics():
    """Collected once: every problem is the same."""
    small = problem()
    needs = {Statistic.GRADIENT, Statistic.INPUT_GRAM, Statistic.OUTPUT_GRAM}
    return rankwise.collect(small.model, [(small.x, small.y)], needs, where=SITES, loss=_loss)


@functools.cache
def sources() -> str:
    """A folder with an earlier adapter, for the methods that read one ("SOURCES" in their tiny arguments)."""
    small, folder = problem(), Path(mkdtemp(prefix="rankwise-sources-"))
    handle = rankwise.adapt_(small.model, rankwise.catalog.lora(rank=2), where=SITES)
    with torch.no_grad():
        for k, block in enumerate(handle.blocks().values()):
            generator = torch.Generator().manual_seed(k)
            for tensor in block.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3)
    return str(handle.save(folder))


def compose(*names: str) -> rankwise.Recipe:
    return rankwise.compose(*(name.replace("SOURCES", sources()) if "SOURCES" in name else name for name in names))


def assert_refusal_helps(error: RecipeError) -> None:
    assert error.problems
    for found in error.problems:
        assert found.piece and found.needs and found.has and found.remedy, f"a reason is incomplete: {found}"
        assert found.needs in str(error) and found.remedy in str(error)


def trains(recipe: rankwise.Recipe, learning_rate: float) -> tuple[float, float]:
    """Takes a few steps; returns the losses before and after, and checks that merging gives the adapted forward."""
    small = problem()
    handle = rankwise.adapt_(small.model, recipe, statistics=statistics(), where=SITES)
    optimizer = handle.optimizer(lr=learning_rate)
    own, classes, loss = getattr(handle.procedure, "loss", None), small.y.argmax(1), small.loss
    if own is not None:  # a procedure that makes the loss itself, from inputs in [0, 1] and classes
        small.x = small.x.sigmoid()
        small.loss = lambda: nn.functional.cross_entropy(small.model(small.x), classes)  # type: ignore[method-assign]
        loss = lambda: own(small.model, small.x, classes)  # noqa: E731
    with torch.no_grad():
        first = small.loss().item()
    for _ in range(STEP_COUNT):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    with torch.no_grad():
        small.model.eval()
        adapted, last = small.model(small.x), small.loss().item()
        handle.merge_()
        torch.testing.assert_close(small.model(small.x), adapted, rtol=1e-9, atol=1e-9)
        handle.unmerge_()
    return first, last


def falls(recipe: rankwise.Recipe) -> bool:
    """Whether the loss falls at one of a few learning rates; preconditioned and sign-like steps want different ones."""
    for learning_rate in (1e-2, 1e-1, 1e-3, 1e-4):
        first, last = trains(recipe, learning_rate)
        if last < first:
            return True
    return False


@functools.cache
def reasons(*names: str) -> tuple[str, ...]:
    """Why a composition is refused, before anything is touched; empty means legal."""
    try:
        found = rankwise.problems(problem().model, compose(*names), where=SITES, statistics=statistics())
        if found:
            raise RecipeError(" + ".join(names), found)
    except RecipeError as error:
        assert_refusal_helps(error)
        return tuple(problem.needs for problem in error.problems)
    return ()


def outcome(*names: str) -> str:
    """Tries one composition: "legal", or "refused"; anything else raises."""
    if not reasons(*names):
        recipe = compose(*names)
        assert falls(recipe), f"{recipe.name} is legal, but its loss does not fall"
        return "legal"
    with pytest.raises(RecipeError):
        rankwise.adapt_(problem().model, compose(*names), statistics=statistics(), where=SITES)
    return "refused"


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_with_every_piece_it_is_legal_and_trains_or_is_refused(parameterization: str, record_property) -> None:
    counts = {"legal": 0, "refused": 0}
    for other in itertools.chain(*OTHERS.values()):
        counts[outcome(parameterization, other)] += 1
    assert outcome(parameterization) == "legal"
    for key, value in counts.items():
        record_property(key, value)


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(OTHERS, 2)], ids=lambda shelf: shelf)
def test_pairs_of_other_pieces(one: str, other: str) -> None:
    host = next((HOSTS[shelf] for shelf in (one, other) if shelf in HOSTS), "lora(rank=2)")
    found = {outcome(host, *pair) for pair in itertools.product(OTHERS[one], OTHERS[other])}
    assert "legal" in found


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_what_is_made_of_legal_pairs_is_legal(parameterization: str) -> None:
    """On a sample of the full product; of the legal ones some are trained."""
    draw = random.Random(f"compositions/{parameterization}")
    legal = []
    for _ in range(SAMPLED):
        chosen = [draw.choice([None, *pieces]) for pieces in OTHERS.values()]
        names = tuple(name for name in chosen if name is not None)
        pairs = [(parameterization, name) for name in names]
        pairs += [(parameterization, *pair) for pair in itertools.combinations(names, 2)]
        found = reasons(parameterization, *names)
        assert bool(found) == any(reasons(*pair) for pair in pairs), f"{parameterization} + {names}: {found}"
        if not found and len(names) > 2:
            legal.append(names)
    for names in legal[:TRAINED]:
        assert outcome(parameterization, *names) == "legal"


def test_two_parameterizations_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="both lora and rslora"):
        rankwise.compose("lora + rslora")
