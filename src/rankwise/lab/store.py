"""The results of a comparison in one SQLite file, through Optuna's storage, so that any stop loses at most the run in flight.

    study "comparison"   attributes: what is compared (settings) and measures of the frozen base
    study per recipe     a trial per run; its parameters say which (learning rate, seed, steps), its attributes hold the rest

A run is found again by its key. A trial that was running when the program died is marked as failed at the next start, and its
run is simply done again. A lock that the operating system drops with the process keeps two programs out of one folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from rankwise.core.errors import ArgumentError, CheckpointError

RATES = (1e-30, 1e30)  # learning rates a results file takes
FILE, LOCK, COMPARISON = "results.sqlite", ".lock", "comparison"
Record = dict[str, Any]


class Store:
    """The folder of one comparison.

    Args:
        out: the folder; made where it is not there.
        settings: plain values that decide the numbers; another comparison's folder is refused.

    Raises:
        ArgumentError: the folder belongs to something else, to another comparison, or to a program that is running.
        CheckpointError: the file is no results file.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.out, self._optuna = out, optuna
        self._lock = _claim(out)
        path = out / FILE
        try:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 30}})
        except Exception as error:  # the database layers below raise many types for a damaged file
            self._lock.close()
            raise CheckpointError(
                f"{path} cannot be opened as results of a comparison ({type(error).__name__}: {error}); move it away"
            ) from error
        try:
            self._studies = {name: self._open(name) for name in self._names()}
            self._check(settings)
            self._clear_interrupted()
        except BaseException:
            self.close()
            raise

    def _names(self) -> list[str]:
        return [study.study_name for study in self._optuna.get_all_study_summaries(self._storage, include_best_trial=False)]

    def _open(self, name: str) -> Any:
        return self._optuna.create_study(
            storage=self._storage, study_name=name, load_if_exists=True, sampler=self._optuna.samplers.RandomSampler(seed=0)
        )

    def _study(self, name: str) -> Any:
        if name not in self._studies:
            self._studies[name] = self._open(name)
        return self._studies[name]

    def _check(self, settings: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(settings))
        stored = self.note(COMPARISON, "settings")
        if stored is None:
            self.keep(COMPARISON, "settings", wanted)
            return
        differing = "; ".join(
            f"{key}: {stored.get(key, 'not set')} there, {wanted.get(key, 'not set')} asked for"
            for key in sorted(set(stored) | set(wanted))
            if stored.get(key) != wanted.get(key)
        )
        if differing:
            raise ArgumentError(
                f"{self.out} holds another comparison ({differing}). Choose another --out, or use the settings of that one "
                "to continue it"
            )

    def _clear_interrupted(self) -> None:
        state = self._optuna.trial.TrialState
        for study in self._studies.values():
            for trial in study.get_trials(deepcopy=False, states=(state.RUNNING, state.WAITING)):
                study.tell(trial.number, state=state.FAIL, skip_if_finished=True)

    def claim_recipe(self, name: str, recipe: Mapping[str, Any]) -> None:
        """Ties a recipe's text to what it means, so that a text never stands for two methods in one folder."""
        wanted = json.loads(json.dumps(recipe))
        stored = self.note(name, "recipe")
        if stored is None:
            self.keep(name, "recipe", wanted)
        elif stored != wanted:
            raise ArgumentError(
                f"{name!r} stood for another method or other defaults when {self.out} was begun; choose another --out"
            )

    def note(self, study: str, name: str) -> Any:
        """A kept value, or None."""
        return self._study(study).user_attrs.get(name)

    def keep(self, study: str, name: str, value: Any) -> None:
        """Keeps a plain value."""
        self._study(study).set_user_attr(name, value)

    def noted(self, study: str, name: str, make: Callable[[], Any]) -> Any:
        """The kept value, made and kept first where there is none."""
        value = self.note(study, name)
        if value is None:
            self.keep(study, name, make())
            value = self.note(study, name)
        return value

    def runs(self, recipe: str) -> list[Record]:
        """Finished runs of a recipe, each with its `key` fields and its measures."""
        trials = self._study(recipe).get_trials(deepcopy=False)
        return [_record(trial.user_attrs) for trial in trials if "outcome" in trial.user_attrs]

    def find(self, recipe: str, key: Mapping[str, Any]) -> Record | None:
        """The finished run of a key, or None."""
        return next((run for run in self.runs(recipe) if all(run.get(name) == value for name, value in key.items())), None)

    def run(self, recipe: str, key: Mapping[str, Any], work: Callable[[], Record]) -> Record:
        """The finished run of a key; does the work where there is none and keeps what it returns.

        Args:
            recipe: name of the study.
            key: learning_rate, seed, steps and phase.
            work: gives the measures, among them "outcome" ("finished" or "diverged") and "score".
        """
        found = self.find(recipe, key)
        if found is not None:
            return found
        study, state, kind = self._study(recipe), self._optuna.trial.TrialState, self._optuna.distributions
        numbers = {name: key[name] for name in ("learning_rate", "seed", "steps")}
        study.enqueue_trial(numbers, user_attrs=dict(key))
        trial = study.ask(
            fixed_distributions={
                "learning_rate": kind.FloatDistribution(*RATES, log=True),
                "seed": kind.IntDistribution(0, 2**31),
                "steps": kind.IntDistribution(1, 10**9),
            }
        )
        try:
            record = work()
        except BaseException:
            study.tell(trial, state=state.FAIL)
            raise
        trial.set_user_attr("measures", record)
        trial.set_user_attr("outcome", record["outcome"])  # last: a run with an outcome is whole
        score = record.get("score")
        finite = record["outcome"] == "finished" and score is not None and math.isfinite(score)
        study.tell(trial, score) if finite else study.tell(trial, state=state.FAIL)
        return {**key, **record}

    def close(self) -> None:
        """Lets go of the file and of the folder."""
        self._storage.remove_session()
        self._storage.engine.dispose()
        self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _record(attributes: Mapping[str, Any]) -> Record:
    return {**{key: value for key, value in attributes.items() if key != "measures"}, **attributes["measures"]}


def _claim(out: Path) -> IO[str]:
    """Makes sure that the folder is ours, and takes its lock."""
    import fcntl

    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; choose a folder")
    strangers = sorted(path.name for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    if strangers and not (out / FILE).is_file():
        raise ArgumentError(
            f"--out {out} holds {len(strangers)} files of something else ({', '.join(strangers[:3])}), no {FILE}; "
            "choose an empty or a new folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a+")
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written ({error})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise ArgumentError(
            f"another comparison is running in {out} (process {owner}); wait for it or choose another --out"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
