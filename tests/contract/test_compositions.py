"""Every parameterization × start × step × perturbation × schedule: legal and trains, or refused with reasons. No third outcome.

A legal composition adapts a small problem, its loss falls, and merging gives the adapted forward. An illegal one is refused
before anything is touched, by problems that name what is needed, what is there, and the way out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import RecipeError
from rankwise.core.statistics import Statistic

PARAMETERIZATIONS = {
    "lora": "lora(rank=2)",
    "rslora": "rslora(rank=2, alpha=2)",
    "lora_fa": "lora_fa(rank=2)",
    "dora": "dora(rank=2)",
    "vera": "vera(rank=4)",
    "lora_xs": "lora_xs(rank=2)",
    "flora_core": "flora_core(rank=2)",
    "bone": "bone(rank=2)",
    "bone_bat": "bone(rank=2, mode='bat')",
    "gated_lora": "gated_lora(rank=2)",
    "gated_lora_sora": "gated_lora(rank=2, form='sora')",
    "full": "full",
}
STARTS = {
    None: None,
    "pissa": "pissa",
    "pissa_absorb": "pissa(mode='absorb')",
    "lora_one": "lora_one",
    "nystrom_nora": "nystrom_nora",
    "eva": "eva",
    "lora_sb": "lora_sb(learning_rate=0.001)",
}
STEPS = {
    "adamw": "adamw",
    "sgd": "sgd",
    "lora_plus": "lora_plus(ratio=4.0)",
    "scaled_gd": "scaled_gd(damping=0.01)",
    "reflora": "reflora(warmup=1)",
    "galore": "galore(rank=2, refresh=2)",
}
PERTURBATIONS = {None: None, "sam": "sam(rho=0.01)", "nbar": "bar(kind='nbar')", "obar": "bar(kind='obar')"}
SCHEDULES = {
    None: None,
    "adalora": "adalora(rank=2, target_rank=1, total_steps=6, warmup_steps=1, final_steps=2, interval=1)",
    "sora": "sora(threshold=1e-5)",
}
STEP_COUNT = 6


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
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
        x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
        change = torch.outer(torch.randn(8, generator=generator), torch.randn(6, generator=generator)).double() * 0.4
        weight = model[0].weight.clone()
        model[0].weight.add_(change)
        y = model(x)
        model[0].weight.copy_(weight)
    return Problem(model, x, y)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


_STATISTICS = {}


def statistics():
    """Collected once: every problem is the same."""
    if not _STATISTICS:
        small = problem()
        needs = {Statistic.GRADIENT, Statistic.INPUT_GRAM}
        _STATISTICS.update(rankwise.collect(small.model, [(small.x, small.y)], needs, loss=_loss))
    return _STATISTICS


def compose(*names: str | None) -> rankwise.Recipe:
    return rankwise.compose(*(text for text in names if text is not None))


def assert_refusal_helps(error: RecipeError) -> None:
    assert error.problems
    for found in error.problems:
        assert found.piece and found.needs and found.has and found.remedy, f"a reason is incomplete: {found}"
        assert found.needs in str(error) and found.remedy in str(error)


def trains(recipe: rankwise.Recipe, learning_rate: float) -> tuple[float, float]:
    """Takes a few steps; returns the losses before and after, and checks that merging gives the adapted forward."""
    small = problem()
    handle = rankwise.adapt_(small.model, recipe, statistics=statistics(), where=["0", "2"])
    optimizer = handle.optimizer(lr=learning_rate)
    with torch.no_grad():
        first = small.loss().item()
    for _ in range(STEP_COUNT):
        small.loss().backward()
        handle.after_backward(lambda: small.loss().backward())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    with torch.no_grad():
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


def outcome(*names: str | None) -> str:
    """Tries one composition: "legal", or "refused"; anything else raises."""
    try:
        recipe = compose(*names)
        found = rankwise.problems(problem().model, recipe, where=["0", "2"], statistics=statistics())
        if found:
            with pytest.raises(RecipeError) as refusal:
                rankwise.adapt_(problem().model, recipe, statistics=statistics(), where=["0", "2"])
            assert_refusal_helps(refusal.value)
            return "refused"
    except RecipeError as error:
        assert_refusal_helps(error)
        return "refused"
    assert falls(recipe), f"{recipe.name} is legal, but its loss does not fall"
    return "legal"


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_composition_is_legal_and_trains_or_is_refused(parameterization: str, start: str | None, record_property) -> None:
    counts = {"legal": 0, "refused": 0}
    for step, perturbation, schedule in itertools.product(STEPS, PERTURBATIONS, SCHEDULES):
        names = (
            PARAMETERIZATIONS[parameterization],
            STARTS[start],
            STEPS[step],
            PERTURBATIONS[perturbation],
            SCHEDULES[schedule],
        )
        counts[outcome(*names)] += 1
    assert counts["legal"] + counts["refused"] == len(STEPS) * len(PERTURBATIONS) * len(SCHEDULES)
    for key, value in counts.items():
        record_property(key, value)


def test_two_parameterizations_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="both lora and rslora"):
        rankwise.compose("lora + rslora")


def test_the_list_covers_the_catalog() -> None:
    """A method added to the catalog is tried here too."""
    for shelf, tried in (
        ("parameterization", PARAMETERIZATIONS),
        ("start", STARTS),
        ("step", STEPS),
        ("schedule", SCHEDULES),
    ):
        known = {text.split("(")[0] for text in tried.values() if text is not None}
        missing = set(rankwise.catalog.names(shelf)) - known
        assert not missing, f"{sorted(missing)} of shelf {shelf} are tried in no composition"
