"""Why a recipe cannot be trained: its chain of steps, how gradients are taken, and what a procedure asks of a parameterization.

A part of `legality`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankwise.core.errors import Problem
from rankwise.core.step import CLIPPING, MOMENTS

if TYPE_CHECKING:
    from rankwise.core.recipe import Recipe


def chain_problems(recipe: Recipe) -> list[Problem]:
    """Reasons in the chain of steps."""
    found = []
    steps = recipe.steps()
    moments = [step.name for step in steps if step.stage == MOMENTS]
    if len(moments) != 1:
        found.append(
            Problem(
                piece="the chain of steps",
                needs="exactly one step that makes the update (adamw, sgd, galore)",
                has=f"this one has {', '.join(moments) or 'none'}",
                remedy="name one of them",
            )
        )
    preconditioners = [step.name for step in steps if step.preconditions]
    if len(preconditioners) > 1:
        found.append(
            Problem(
                piece="the chain of steps",
                needs="at most one preconditioner",
                has=f"{' and '.join(preconditioners)} would both precondition the same gradient",
                remedy=f"keep {' or '.join(preconditioners)}",
            )
        )
    clipping = [step.name for step in steps if step.stage == CLIPPING]
    ordered = [step.name for step in steps if step.order]
    if len(clipping) > 1 or (clipping and ordered):
        found.append(
            Problem(
                piece="the chain of steps",
                needs="at most one step that clips, and none that moves factors one after the other beside it",
                has=f"this one has {' and '.join([*clipping, *ordered])}",
                remedy=f"keep {' or '.join([*clipping, *ordered])}",
            )
        )
    gains = [step.name for step in steps if step.gain is not None]
    facts = recipe.method.facts_of(**recipe.parameterization.arguments)
    if gains and (len(gains) > 1 or not (facts.additive and facts.exact_lora_export)):
        found.append(
            Problem(
                piece=f"step {gains[0]}",
                needs="an additive parameterization with exact factors, and no other step that rescales rows of the gradient",
                has=f"the steps {' and '.join(gains)} on {recipe.parameterization.name}",
                remedy="use lora, rslora or gated_lora, and name it once",
            )
        )
    return found


def pass_problems(recipe: Recipe) -> list[Problem]:
    """Two methods that each take gradients in a way of their own."""
    parts = [part for part in (recipe.perturbation, recipe.procedure) if part is not None]
    own = [
        part.name
        for part in parts
        if getattr(part.factory, "second_pass", False) or getattr(part.factory, "forward_only", False)
    ]
    exact = (
        [step.name for step in recipe.steps() if step.exact] if recipe.perturbation and recipe.perturbation.name in own else []
    )
    clashes = [own] if len(own) > 1 else [[own[0], name] for name in exact] if own else []
    blind = recipe.perturbation is not None and getattr(recipe.perturbation.factory, "forward_only", False)
    found = []
    if blind and not recipe.method.facts_of(**recipe.parameterization.arguments).same_in_evaluation:
        found.append(
            Problem(
                piece=f"perturbation {own[0]}",
                needs="a parameterization whose evaluation shows what its trained tensors do, since it evaluates only",
                has=f"{recipe.parameterization.name} acts otherwise in training",
                remedy="use another parameterization, or train with gradients",
            )
        )
    return found + [
        Problem(
            piece=" and ".join(pair),
            needs="gradients that are taken in one way, at the factors where they are",
            has=f"{pair[0]} takes them in its own way, and {pair[1]} needs them in another",
            remedy=f"keep {pair[0]} or {pair[1]}",
        )
        for pair in clashes
    ]


def renewal_problems(recipe: Recipe) -> list[Problem]:
    """What the procedure asks of sites and the parameterization cannot do."""
    asked: frozenset[str] = frozenset() if recipe.procedure is None else recipe.procedure.factory.renews  # type: ignore[attr-defined]
    missing = sorted(asked - recipe.method.renewals())
    if recipe.procedure is None or not missing:
        return []
    return [
        Problem(
            piece=f"procedure {recipe.procedure.name}",
            needs=f"a parameterization that can {' and '.join(missing)}",
            has=f"{recipe.parameterization.name} cannot",
            remedy="leave out the other parameterization; the procedure brings its own",
        )
    ]
