"""Every factor step of the catalog as a solver of matrix problems with a known answer.

`python -m experiments.solvers --write docs/results/solvers.md` runs them at condition numbers 1, 10 and 100, at the true rank
and at twice it, each at its best rate of a small grid, and writes the page with its figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rankwise
from rankwise import catalog
from rankwise.core.step import MOMENTS, Step
from rankwise.problems.problem import Problem
from rankwise.problems.solve import solve
from rankwise.problems.trace import Trace
from rankwise.steps.moments import sgd

CONDITIONS = (1.0, 10.0, 100.0)
WIDER = (1, 2)  # the rank of the factors over the true one
SIZES: dict[str, dict[str, Any]] = {
    "factorization": {"m": 30, "n": 25, "rank": 3},
    "sensing": {"m": 14, "n": 12, "rank": 2, "measurements": 400, "symmetric": False},
    "completion": {"m": 40, "n": 36, "rank": 2, "rate": 0.5},
}
GOAL, PRECISE = 1e-6, 1e-9
EVERY = 3  # iterations between two looks at the error
DRAWN = 5  # completion problems that are counted
DAMPED = "scaled_gd(damping=0.01)"  # by the smallest singular value at condition 100
RATES = (0.6, 0.25, 0.9, 0.08, 0.02)
LIMIT, PLAIN_LIMIT, ADAM_LIMIT = 400, 1500, 1200  # iterations; plain gradient descent needs more to be seen at all
ADAM_RATES, HALF_LIVES = (0.1,), (20, 60)  # iterations until the rate is half


@dataclass(frozen=True)
class Solver:
    """A chain of steps under the text of its recipe; `entry` is its name in the catalog."""

    entry: str
    name: str
    make: Callable[[], list[Step]]

    @property
    def preconditions(self) -> bool:
        """Whether one of its steps preconditions the gradient."""
        return any(step.preconditions for step in self.make())

    @property
    def further(self) -> bool:
        """Whether it is another form of its entry, or has Adam's falling rates: run on factorization alone."""
        return self.adaptive or self.name != next(o.name for o in solvers() if o.entry == self.entry and not o.adaptive)

    @property
    def plain(self) -> bool:
        """Whether it is gradient descent and nothing else."""
        return [step.name for step in self.make()] == ["sgd"]

    @property
    def limit(self) -> int:
        """Iterations at most."""
        return PLAIN_LIMIT if self.plain else ADAM_LIMIT if self.adaptive else LIMIT

    @property
    def adaptive(self) -> bool:
        """Whether its steps have the size of the rate whatever the gradient, so that the rate has to fall."""
        return any(step.stage == MOMENTS and step.name != "sgd" for step in self.make())

    def __str__(self) -> str:
        return self.name


@cache
def solvers() -> tuple[Solver, ...]:
    """Of every catalog entry whose steps need no roles but A and B, each variant: on SGD where it is a chain, and as it is."""
    found: dict[str, Solver] = {}
    for slug in catalog.names("step"):
        entry = catalog.entry(slug)
        for text in (entry.small, *entry.variants):
            recipe = rankwise.compose(text)
            steps = recipe.steps()
            if not frozenset().union(*(step.roles for step in steps)) <= {"A", "B"} or not _has_factors(recipe):
                continue
            others = [step for step in steps if step.stage != MOMENTS]
            if others and any(step.name == "adamw" for step in steps):
                found.setdefault(f"{text} + sgd", Solver(slug, f"{text} + sgd", _on_sgd(text)))
            found.setdefault(text, Solver(slug, text, _as_it_is(text)))
    return tuple(found.values())


def _has_factors(recipe: Any) -> bool:
    return {"A", "B"} <= recipe.method.roles_of(**recipe.parameterization.arguments)


def _as_it_is(text: str) -> Callable[[], list[Step]]:
    return lambda: list(rankwise.compose(text).steps())


def _on_sgd(text: str) -> Callable[[], list[Step]]:
    return lambda: [*(step for step in rankwise.compose(text).steps() if step.stage != MOMENTS), sgd()]


def problem_of(kind: str, condition: float, seed: int = 0) -> Problem:
    """One instance."""
    return catalog.matrix_problems(kind, condition=condition, seed=seed, **SIZES[kind])


def attempts(solver: Solver, rates: tuple[float, ...] = RATES) -> Iterator[tuple[str, float | Callable[[int], float]]]:
    """The rates to try, with what to call them."""
    if not solver.adaptive:
        for rate in rates:
            yield f"{rate:g}", rate
        return
    for rate in ADAM_RATES:
        for half in HALF_LIVES:
            yield f"{rate:g}, halved every {half}", lambda iteration, rate=rate, half=half: rate * 0.5 ** (iteration / half)


@dataclass(frozen=True)
class Run:
    """The best of a solver's attempts at one problem."""

    rate: str
    trace: Trace | None  # None where every attempt ended in numbers that are not finite

    @property
    def iterations(self) -> int | None:
        """To the goal."""
        return None if self.trace is None else self.trace.iterations_to(GOAL)

    @property
    def error(self) -> float:
        """The last."""
        return float("inf") if self.trace is None else float(self.trace.error[-1])


def best(solver: Solver, problem: Problem, rank: int, *, limit: int | None = None, rates: tuple[float, ...] = RATES) -> Run:
    """The attempt that is at the goal first, or ends nearest; LoRA's own start, B = 0."""
    limit = limit or solver.limit
    chosen, order = Run("none", None), (float("inf"), float("inf"))
    for name, rate in attempts(solver, rates):
        try:
            trace = solve(
                problem, rank=rank, init="lora", step=solver.make(), lr=rate, iterations=limit, every=EVERY, stop=PRECISE
            )
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  (a factorization of numbers that are not finite)
            continue
        if trace.diverged:
            continue
        run = Run(name, trace)
        key = (float("inf") if run.iterations is None else run.iterations, run.error)
        if key < order:
            chosen, order = run, key
            limit = min(limit, max(50, run.iterations)) if run.iterations is not None else limit  # a slower one is not needed
    return chosen


Runs = dict[tuple[str, int, float, str], Run]  # (kind, wider, condition, solver)


def run_all(report: Callable[[str], None] = print) -> Runs:
    """Everything of the page."""
    found: Runs = {}
    for kind in SIZES:
        for wider in WIDER:
            for condition in CONDITIONS:
                problem, began = problem_of(kind, condition), time.monotonic()
                for solver in solvers():
                    if solver.further and (kind, wider) != ("factorization", 1):
                        continue
                    found[kind, wider, condition, solver.name] = best(solver, problem, wider * problem.rank)
                report(f"{problem.name}, factors {wider}x, condition {condition:g}: {time.monotonic() - began:.0f} s")
    return found


Draws = dict[tuple[str, int, float], int]  # (solver, wider, condition) -> problems solved


def completions() -> Draws:
    """How many of several completion problems gradient descent and the preconditioners solve: there it depends on the draw."""
    found: Draws = {}
    chosen = [solver for solver in solvers() if not solver.further and (solver.preconditions or solver.plain)]
    for solver in [*chosen, Solver("scaled_gd", f"{DAMPED} + sgd", _on_sgd(DAMPED))]:
        for wider in WIDER:
            for condition in CONDITIONS:
                problems = [problem_of("completion", condition, seed) for seed in range(DRAWN)]
                runs = [best(solver, problem, wider * problem.rank, limit=LIMIT, rates=RATES[:3]) for problem in problems]
                found[solver.name, wider, condition] = sum(run.iterations is not None for run in runs)
    return found


def main() -> None:
    """The command."""
    from experiments.solvers_page import figure, page

    parser = argparse.ArgumentParser(prog="python -m experiments.solvers", description=__doc__)
    parser.add_argument("--write", metavar="PAGE", help="also write the page, such as docs/results/solvers.md, and its figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    found, draws = run_all(), completions()
    command = "python -m experiments.solvers" + (f" --write {options.write}" if options.write else "")
    text = page(found, draws, command, time.process_time() - began)
    if options.write:
        target = Path(options.write)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.with_suffix(".svg").write_text(figure(found), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
