"""`rankwise compare`: which low-rank method, at which learning rate, is best for a model and its data, and is it resolved?

1. costs    each recipe is counted against the frozen base on one batch
2. sweep    each recipe looks for its learning rate in short runs, judged on batches of the training stream that no run of the
            sweep trains on; the data that is reported on is never touched
3. seeds    every recipe runs at its rate on every seed: the same head, batches and dropout for all
4. report   table, sentences and a page that opens offline

All of it is kept as it comes; the same call goes on where the last one stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rankwise.core.adapt import adapt_, problems
from rankwise.core.compose import compose
from rankwise.core.errors import ArgumentError, Problem, RecipeError
from rankwise.core.recipe import Recipe
from rankwise.lab import report, result, store, sweep
from rankwise.lab.arguments import SWEEP_SEED, named_rates, named_recipes, seed_list, slug, versions
from rankwise.lab.counters import Cost, frozen_cost, training_cost
from rankwise.lab.protocol import Task
from rankwise.lab.result import ComparisonResult
from rankwise.lab.spectra import layer_spectra
from rankwise.lab.terminal import Progress, show
from rankwise.lab.training import Starts, exploded, mean_loss, train

VALIDATION = 8  # batches that judge a run of the sweep
Record = dict[str, Any]


def run_compare(
    task: Task,
    recipes: Sequence[str],
    *,
    steps: int,
    out: str | Path,
    batch_size: int = 16,
    seeds: int | Sequence[int] = 3,
    learning_rates: str | Sequence[float] = "auto",
    rates: int = 5,
    probes: int = 8,
    command: str = "",
    quiet: bool = False,
) -> ComparisonResult:
    """Compares recipes on one task and writes results, adapters and a report.

    Args:
        task: model and data, from `rankwise.lab.tasks.make_task`.
        recipes: texts such as "lora", "dora(rank=4) + reflora".
        steps: of each final run; the sweep's runs take a quarter and a half of them.
        out: folder for results.sqlite, adapters/, comparison.json and report.html; one that holds this comparison is continued.
        batch_size: rows per step.
        seeds: how many, or which.
        learning_rates: "auto", or the rates to try.
        rates: how many "auto" starts with, half a decade apart.
        probes: batches for starts that read statistics.
        command: how this was called, for the report.
        quiet: print nothing.

    Raises:
        RecipeError, ArgumentError: before anything is trained.
    """
    comparison = _Comparison(task, recipes, steps, Path(out), batch_size, seeds, learning_rates, rates, probes, command, quiet)
    return comparison.run()


class _Comparison:
    def __init__(
        self,
        task: Task,
        recipes: Sequence[str],
        steps: int,
        out: Path,
        batch_size: int,
        seeds: int | Sequence[int],
        learning_rates: str | Sequence[float],
        rates: int,
        probes: int,
        command: str,
        quiet: bool,
    ) -> None:
        self.task, self.out, self.steps, self.batch_size = task, out, steps, batch_size
        self.seeds = seed_list(seeds)
        self.recipes = named_recipes(recipes)
        self.rates = None if learning_rates == "auto" else named_rates(learning_rates)
        if steps < 4 or batch_size < 1 or rates < 2 or probes < 1:
            raise ArgumentError(
                "compare needs steps >= 4, batch_size >= 1, rates >= 2 and probes >= 1; "
                f"got {steps}, {batch_size}, {rates}, {probes}"
            )
        self.count, self.command, self.quiet = rates, command, quiet
        self.rungs = (max(2, steps // 4), max(3, steps // 2))
        self.starts = Starts(task, probes)
        self.settings: Record = {
            **{f"task {key}": value for key, value in task.describe().items()},
            "metric": task.metric_name,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rates": "auto" if self.rates is None else self.rates,
            "rates": rates if self.rates is None else len(self.rates),
            "probes": probes,
        }

    def run(self) -> ComparisonResult:
        begin = time.perf_counter()
        self._refuse_illegal()
        with store.Store(self.out, self.settings) as self.store:
            for name, recipe in self.recipes.items():
                self.store.claim_recipe(name, recipe.to_json())
            before = self.store.note(store.COMPARISON, "seconds") or 0.0
            try:
                with Progress(self._expected_steps(), quiet=self.quiet) as self.progress:
                    base = self.store.noted(store.COMPARISON, "base", self._measure_base)
                    costs = {name: self._cost(name, recipe, base) for name, recipe in self.recipes.items()}
                    sweeps = {name: self._sweep(name, recipe) for name, recipe in self.recipes.items()}
                    for seed in self.seeds:  # seed by seed, so that a stop leaves a balanced table
                        for name, recipe in self.recipes.items():
                            if sweeps[name]["best"] is not None:
                                self._final(name, recipe, sweeps[name]["best"], seed, base)
            finally:
                self.store.keep(store.COMPARISON, "seconds", before + time.perf_counter() - begin)
            found = self._result(base, costs, sweeps)
        found.save(self.out / "comparison.json")
        assert found.report is not None
        report.write(found, found.report)
        if not self.quiet:
            show(found)
        return found

    def _refuse_illegal(self) -> None:
        model = self.task.fresh_model(self.seeds[0])
        refused: dict[str, list[Problem]] = {}
        for name, recipe in self.recipes.items():
            found = problems(model, recipe, self.task.where, train_also=tuple(self.task.head))
            if found:
                refused[name] = found
        if refused:
            raise RecipeError(", ".join(refused), [problem for found in refused.values() for problem in found])

    def _expected_steps(self) -> int:
        """Steps still to do, as far as known: widening may add some."""
        count = self.count if self.rates is None else len(self.rates)
        per_sweep = 0 if count == 1 else count * self.rungs[0] + max(2, math.ceil(count / 2)) * self.rungs[1]
        total = 0
        for name in self.recipes:
            done = self.store.runs(name)
            if self.store.note(name, "sweep") is None:
                total += max(0, per_sweep - sum(run["steps"] for run in done if run["phase"] == "sweep"))
            finals = {run["seed"] for run in done if run["phase"] == "final"}
            total += self.steps * sum(seed not in finals for seed in self.seeds)
        return total

    def _measure_base(self) -> Record:
        self.progress.phase("the frozen base")
        model = self.task.fresh_model(self.seeds[0])
        cost = frozen_cost(model, self._sites(), self._counted_batch())
        model.eval()
        return {"cost": cost.to_json(), "metrics": dict(self.task.evaluate(model)), "retention": self.task.retention(model)}

    def _sites(self) -> list[str]:
        model = self.task.fresh_model(self.seeds[0])
        handle = adapt_(model, compose("lora(rank=1)"), self.task.where, train_also=tuple(self.task.head))
        return list(handle.targets)

    def _counted_batch(self) -> Any:
        return next(iter(self.task.train_batches(self.batch_size, 1, SWEEP_SEED)))

    def _cost(self, name: str, recipe: Recipe, base: Record) -> Record:
        def count() -> Record:
            self.progress.phase(f"{name}: counting")
            model = self.task.fresh_model(self.seeds[0])
            statistics, _ = self.starts.of(model, recipe, self.seeds[0])
            handle = adapt_(model, recipe, self.task.where, statistics, seed=0, train_also=tuple(self.task.head))
            cost = training_cost(handle, self._counted_batch())
            return cost.to_json()

        counted = Cost(**self.store.noted(name, "cost", count))
        return {**counted.to_json(), **{f"relative_{k}": v for k, v in counted.relative_to(Cost(**base["cost"])).items()}}

    def _sweep(self, name: str, recipe: Recipe) -> Record:
        def search() -> Record:
            rates = sweep.grid(sweep.prior(recipe, self.steps), self.count) if self.rates is None else self.rates
            if len(rates) == 1:
                return {"best": rates[0], "scores": [], "at_edge": False, "steps": 0}
            stream = self.task.train_batches(self.batch_size, self.rungs[-1] + VALIDATION, SWEEP_SEED)
            held = list(islice(stream, self.rungs[-1], None))
            found = sweep.sweep(
                rates,
                self.rungs,
                lambda rate, steps: self._short_run(name, recipe, rate, steps, held),
                widen=self.rates is None,
            )
            scores = [[steps, [[rate, _finite(loss)] for rate, loss in kept.items()]] for steps, kept in found.scores.items()]
            return {"best": found.best, "scores": scores, "at_edge": found.at_edge, "steps": found.steps}

        return self.store.noted(name, "sweep", search)

    def _short_run(self, name: str, recipe: Recipe, rate: float, steps: int, held: Sequence[Any]) -> float:
        def work() -> Record:
            run = self._train(f"{name}: sweep at {rate:g}", recipe, rate, SWEEP_SEED, steps)
            score = math.inf if run.failure else mean_loss(run.handle.model, held)
            diverged = bool(run.failure) or exploded(score, run.curve)
            why = run.failure or (f"the loss after training is {score:.4g}" if diverged else "")
            score = math.inf if diverged else score
            return {
                "outcome": "diverged" if diverged else "finished",
                "reason": why,
                "score": _finite(score),
                "curve": run.curve,
            }

        key = {"phase": "sweep", "learning_rate": rate, "seed": SWEEP_SEED, "steps": steps}
        score = self.store.run(name, key, work)["score"]
        return math.inf if score is None else score

    def _final(self, name: str, recipe: Recipe, rate: float, seed: int, base: Record) -> Record:
        def work() -> Record:
            run = self._train(f"{name}: seed {seed} at {rate:g}", recipe, rate, seed, self.steps)
            record: Record = {"outcome": "diverged", "reason": run.failure, "score": None, "curve": run.curve, "metrics": {}}
            if run.failure:
                return record
            model = run.handle.model.eval()
            metrics = {key: float(value) for key, value in self.task.evaluate(model).items()}
            if not all(map(math.isfinite, metrics.values())):
                return {**record, "reason": f"a measure is not finite: {metrics}"}
            kept = self.task.retention(model)
            folder = run.handle.save(self.out / "adapters" / slug(name) / f"seed-{seed}")
            return {
                **record,
                "outcome": "finished",
                "score": metrics[self.task.metric_name],
                "metrics": metrics,
                "retention": None if kept is None or base["retention"] is None else kept - base["retention"],
                "seconds_per_step": run.seconds_per_step,
                "start_seconds": run.start_seconds,
                "adapter_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
                "adapter": str(folder.relative_to(self.out)),
                "unfinished": None if run.handle.schedule is None else run.handle.schedule.unfinished(run.handle.step_count),
                "spectra": layer_spectra(run.handle) if seed == self.seeds[0] else None,
            }

        return self.store.run(name, {"phase": "final", "learning_rate": rate, "seed": seed, "steps": self.steps}, work)

    def _train(self, what: str, recipe: Recipe, rate: float, seed: int, steps: int) -> Any:
        self.progress.phase(what)
        return train(
            self.task,
            recipe,
            learning_rate=rate,
            seed=seed,
            steps=steps,
            batch_size=self.batch_size,
            starts=self.starts,
            whole=self.steps,
            on_step=self.progress.step,
        )

    def _result(self, base: Record, costs: Mapping[str, Record], sweeps: Mapping[str, Record]) -> ComparisonResult:
        rows = []
        for name in self.recipes:
            finals = [run for run in self.store.runs(name) if run["phase"] == "final" and run["seed"] in self.seeds]
            finals.sort(key=lambda run: run["seed"])
            rows.append(result.make_row(name, finals, sweeps[name], costs[name], self.task.metric_name))
        differences, winner, statements = result.judge(rows, self.task.metric_name, self.task.higher_is_better)
        return ComparisonResult(
            self.task.metric_name,
            self.task.higher_is_better,
            rows,
            differences,
            statements,
            winner,
            base,
            self.settings,
            {"command": self.command, "seconds": self.store.note(store.COMPARISON, "seconds"), **versions()},
            self.out,
            self.out / "report.html",
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
