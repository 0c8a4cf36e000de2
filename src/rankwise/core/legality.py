"""Why a recipe is illegal: every reason at once, each with a way out. Nothing is built and no model is touched.

Roles: a step, perturbation, schedule or procedure needs trained tensors by name. Starts: a parameterization holds some kinds.
Sites: rank, layer kind, and what a method itself says of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rankwise.core import training_rules
from rankwise.core.errors import Problem
from rankwise.core.parameterization import FROZEN_OUTPUT, INPUT, OUTPUT, PAIR, PRODUCT, Site
from rankwise.core.statistics import Statistic

if TYPE_CHECKING:
    from rankwise.core.recipe import Recipe


_HELD = {
    PRODUCT: "a product B A",
    INPUT: "an input factor A",
    OUTPUT: "an output factor B, with A = 0",
    FROZEN_OUTPUT: "an output factor B that stays as it starts, with A = 0",
    PAIR: "two factors that both train",
}
_HOLDERS = "use lora, rslora or dora (lora_xs for a product), or drop this start"


def problems_of(recipe: Recipe, sites: Iterable[Site] = (), collected: Iterable[Statistic] | None = None) -> list[Problem]:
    """Every reason why the recipe is illegal, on these sites if given. Empty means legal."""
    return [
        *_role_problems(recipe),
        *_gate_problems(recipe),
        *_pruning_problems(recipe),
        *_restart_problems(recipe),
        *training_rules.renewal_problems(recipe),
        *training_rules.pass_problems(recipe),
        *([] if (part := recipe.perturbation) is None else part.factory.problems_with(recipe, **part.arguments)),  # type: ignore[attr-defined]
        *training_rules.chain_problems(recipe),
        *_start_problems(recipe),
        *_statistics_problems(recipe, collected),
        *_site_problems(recipe, list(sites)),
    ]


def _gate_problems(recipe: Recipe) -> list[Problem]:
    method, arguments = recipe.method, recipe.parameterization.arguments
    if recipe.schedule is None or not recipe.schedule.factory.shrinks_gates or "gate" not in recipe.roles:  # type: ignore[attr-defined]
        return []
    if method.gate_starts_open(**arguments):
        return []
    return [
        Problem(
            piece=f"schedule {recipe.schedule.name}",
            needs="gates that start away from zero, since it pulls them there",
            has=f"those of {recipe.parameterization} start at zero and would never leave",
            remedy="use gated_lora(form='sora')",
        )
    ]


def _pruning_problems(recipe: Recipe) -> list[Problem]:
    prunes = recipe.schedule is not None and recipe.schedule.factory.prunes  # type: ignore[attr-defined]
    if recipe.schedule is None or not prunes or recipe.method.prunable(**recipe.parameterization.arguments):
        return []
    return [
        Problem(
            piece=f"schedule {recipe.schedule.name}",
            needs="trained tensors whose zeros lead back to the base",
            has=f"those of {recipe.parameterization} hold a part of the weight, or a start that is subtracted again",
            remedy="use an additive parameterization (lora, rslora, dora), or drop it",
        )
    ]


def _restart_problems(recipe: Recipe) -> list[Problem]:
    method = recipe.method
    if recipe.procedure is None or not recipe.procedure.factory.restarts:  # type: ignore[attr-defined]
        return []
    narrows = recipe.procedure.build().narrows
    if method.restarts(**recipe.parameterization.arguments):
        return _narrowing_problems(recipe) if narrows else []
    return [
        Problem(
            piece=f"procedure {recipe.procedure.name}",
            needs="a parameterization that can be absorbed into the weight and begin again at zero",
            has=f"{recipe.parameterization.name} cannot",
            remedy="use an additive parameterization of low rank (lora, rslora, lora_fa), or drop it",
        )
    ]


def _narrowing_problems(recipe: Recipe) -> list[Problem]:
    """What a procedure that begins sites again with a smaller rank cannot go with."""
    assert recipe.procedure is not None
    found, piece = [], f"procedure {recipe.procedure.name} with ranks"
    if not recipe.method.narrows(**recipe.parameterization.arguments):
        needs, has = "factors that can begin again at a smaller rank", f"{recipe.parameterization.name} cannot"
        found.append(Problem(piece=piece, needs=needs, has=has, remedy="use lora, rslora or gated_lora, or leave out ranks"))
    if recipe.schedule is not None:
        needs, has = "to be alone in changing factors", f"schedule {recipe.schedule.name} changes them too"
        found.append(Problem(piece=piece, needs=needs, has=has, remedy="leave out ranks, or drop the schedule"))
    return found


def _role_problems(recipe: Recipe) -> list[Problem]:
    method, roles = recipe.parameterization.name, recipe.roles
    trains = f"{method} trains {', '.join(sorted(roles))}"
    found = []
    for shelf in ("step", "perturbation", "schedule", "procedure"):
        pieces = recipe.step if shelf == "step" else (getattr(recipe, shelf),)
        for part in pieces:
            if part is None:
                continue
            needed = part.build().roles  # which may depend on the arguments
            if not needed <= roles:
                found.append(
                    Problem(
                        piece=f"{shelf} {part.name}",
                        needs=f"roles {', '.join(sorted(needed))}",
                        has=trains,
                        remedy=_role_remedy(needed, part.name),
                    )
                )
    return found


def _start_problems(recipe: Recipe) -> list[Problem]:
    if recipe.start is None:
        return []
    found, start, method = [], recipe.start.build(), recipe.parameterization.name
    kinds = recipe.method.start_kinds(**recipe.parameterization.arguments)
    if start.kind not in kinds:
        found.append(
            Problem(
                piece=f"start {recipe.start.name}",
                needs=f"a parameterization that can hold {_HELD[start.kind]}",
                has=f"{method} {'has a start of its own' if not kinds else 'holds only ' + ', '.join(sorted(kinds))}",
                remedy="use lora_fa(train='A')" if start.kind == FROZEN_OUTPUT else _HOLDERS,
            )
        )
    prunes = recipe.schedule is not None and recipe.schedule.factory.prunes  # type: ignore[attr-defined]
    if start.kind in (PRODUCT, PAIR) and prunes and recipe.schedule is not None:
        does = "puts a part of the weight into every direction, which pruning throws away"
        if start.kind == PAIR:
            does = "makes directions that belong together, of which pruning takes some away"
        found.append(
            Problem(
                piece=f"schedule {recipe.schedule.name}",
                needs="directions that can be pruned without loss",
                has=f"start {recipe.start.name} {does}",
                remedy="use a start with B = 0 (eva, nystrom_nora), or drop one of the two",
            )
        )
    return found


def _statistics_problems(recipe: Recipe, collected: Iterable[Statistic] | None) -> list[Problem]:
    missing = sorted(item.value for item in recipe.needs - frozenset(collected or ())) if collected is not None else []
    if not missing:
        return []
    own = recipe.method.needs_of(**recipe.parameterization.arguments) - {Statistic.WEIGHT}
    readers = [str(recipe.parameterization)] if own else []
    readers += [f"start {recipe.start.name}"] if recipe.start is not None and recipe.start.build().needs - own else []
    return [
        Problem(
            piece=" and ".join(readers),
            needs=f"statistics {', '.join(missing)}",
            has="they were not collected",
            remedy="pass statistics=rankwise.collect(model, probe_batches, recipe.needs)",
        )
    ]


def _site_problems(recipe: Recipe, sites: list[Site]) -> list[Problem]:
    method, found = recipe.method, []
    unfit = [site.name for site in sites if site.layout.kind not in method.facts.layouts]
    if unfit:
        kinds = ", ".join(sorted(method.facts.layouts))
        found.append(
            Problem(
                piece=recipe.parameterization.name,
                needs=f"a layer of kind {kinds}",
                has="these layers are of another kind",
                remedy="leave them out with where=",
                sites=tuple(unfit),
            )
        )
    for site in sites:
        width = method.width_of(site.m, site.n, **recipe.arguments_at(site.name))
        if width is not None and not 1 <= width <= min(site.m, site.n):
            found.append(
                Problem(
                    piece=recipe.parameterization.name,
                    needs=f"1 <= rank <= min(m, n) = {min(site.m, site.n)}",
                    has=f"rank is {width} for a layer of {site.m} × {site.n}",
                    remedy=f"use rank={min(site.m, site.n)} or less, or leave the layer out with where=",
                    sites=(site.name,),
                )
            )
        found.extend(method.problems_at(site, **recipe.arguments_at(site.name)))
        found.extend(_projection_problems(recipe, site))
    return found


def _projection_problems(recipe: Recipe, site: Site) -> list[Problem]:
    smaller, steps = min(site.m, site.n), recipe.steps()
    found = [step.problem_at(site.name, site.m, site.n) for step in steps if step.problem_at is not None]
    return [problem for problem in found if problem is not None] + [
        Problem(
            piece=f"step {step.name}",
            needs=f"1 <= rank <= min(m, n) = {smaller}",
            has=f"rank is {step.rank} for a layer of {site.m} × {site.n}",
            remedy=f"use rank={smaller} or less, or leave the layer out with where=",
            sites=(site.name,),
        )
        for step in steps
        if step.rank is not None and not 1 <= step.rank <= smaller
    ]


def _role_remedy(needed: frozenset[str], name: str) -> str:
    if "weight" in needed:
        return f"compose it with full ('full + {name}'), or drop it"
    if "gate" in needed:
        return "use a gated parameterization (gated_lora, or dora(inner=gated_lora)), or drop it"
    return "use a parameterization that trains both factors (lora, rslora, dora), or drop it"
