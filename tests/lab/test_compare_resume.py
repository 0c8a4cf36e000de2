"""Stops in every phase, and what a folder refuses: the resumed comparison equals the uninterrupted one to the bit."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankwise.core.errors import ArgumentError, CheckpointError
from rankwise.lab import report
from rankwise.lab.compare import run_compare
from tests.lab.tiny_task import TinyTask

RECIPES = ["lora(rank=2)", "lora(rank=1) + sgd"]
OPTIONS = {"steps": 12, "seeds": 2, "rates": 2, "quiet": True}


def numbers(found):
    """Everything but the clock."""
    rows = [
        [row.recipe, row.learning_rate, row.metric, row.loss, row.retention, dict(row.cost), row.sweep, row.sweep_steps]
        for row in found.rows
    ]
    runs = [[run[key] for key in ("seed", "curve", "metrics", "spectra")] for row in found.rows for run in row.runs]
    return [rows, runs, found.winner, list(found.statements)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return numbers(run_compare(TinyTask(), RECIPES, out=tmp_path_factory.mktemp("whole") / "out", **OPTIONS))


class Stop:
    """Raises KeyboardInterrupt at the given occurrence of an event, and counts those that come after."""

    def __init__(self, event: str, occurrence: int) -> None:
        self.event, self.left = event, occurrence

    def __call__(self, what: str) -> None:
        if self.event in what:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


PHASES = {
    "counting": ("batch 0 of 1", 2),
    "first run of the sweep": ("batch 1 of 3", 1),
    "second recipe's sweep": ("batch 2 of 6", 3),
    "first seed": ("batch 7 of 12", 1),
    "last seed": ("batch 3 of 12", 4),
    "evaluation": ("evaluate", 4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_loses_at_most_the_run_in_flight(phase: str, whole, tmp_path: Path) -> None:
    task, out = TinyTask(), tmp_path / "out"
    task.interrupt = Stop(*PHASES[phase])
    with pytest.raises(KeyboardInterrupt):
        run_compare(task, RECIPES, out=out, **OPTIONS)
    done = finished_runs(out)
    again, trained = TinyTask(), []
    again.interrupt = lambda what: trained.append(what) if what.startswith("batch 0 of") else None
    assert numbers(run_compare(again, RECIPES, out=out, **OPTIONS)) == whole
    runs = [what for what in trained if what not in ("batch 0 of 1", "batch 0 of 14")]  # counting, held-out batches
    assert len(runs) == finished_runs(out) - done  # nothing is trained twice


def test_ctrl_c_while_the_report_is_written(whole, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(report, "page", lambda found: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_compare(TinyTask(), RECIPES, out=out, **OPTIONS)
    assert not (out / "report.html").exists()
    again = TinyTask()
    again.interrupt = Stop("batch", 1)  # any training would raise
    assert numbers(run_compare(again, RECIPES, out=out, **OPTIONS)) == whole
    assert (out / "report.html").is_file()


def test_more_seeds_and_more_recipes_continue_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_compare(TinyTask(), RECIPES[:1], out=out, **{**OPTIONS, "seeds": 1})
    before = finished_runs(out)
    more = run_compare(TinyTask(), RECIPES, out=out, **OPTIONS)
    assert [row.finished for row in more.rows] == [2, 2]
    assert finished_runs(out) > before
    straight = run_compare(TinyTask(), RECIPES, out=tmp_path / "other", **OPTIONS)
    assert numbers(more) == numbers(straight)


def finished_runs(out: Path) -> int:
    with sqlite3.connect(out / "results.sqlite") as connection:
        (count,) = connection.execute("select count(*) from trial_user_attributes where key = 'outcome'").fetchone()
    connection.close()
    return count


@pytest.mark.slow
def test_kill_nine_is_survived(whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import time\nfrom tests.lab.tiny_task import TinyTask\nfrom rankwise.lab.compare import run_compare\n"
        "task = TinyTask()\ntask.interrupt = lambda what: time.sleep(0.05) if 'of 12' in what else None\n"
        f"run_compare(task, {RECIPES!r}, out={str(out)!r}, **{OPTIONS!r})"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(out.glob("adapters/*/seed-0/adapter.json")):
            assert process.poll() is None, "the program ended before it could be killed"
            time.sleep(0.02)
        with pytest.raises(ArgumentError, match=f"process {process.pid}"):
            run_compare(TinyTask(), RECIPES, out=out, **OPTIONS)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert numbers(run_compare(TinyTask(), RECIPES, out=out, **OPTIONS)) == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [({"steps": 16}, "steps: 12 there, 16 asked for"), ({"batch_size": 8}, "batch_size: 16 there, 8"), ({"rates": 3}, "rates")],
)
def test_another_comparison_is_refused_and_the_difference_named(change, words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_compare(TinyTask(), RECIPES[:1], out=out, **OPTIONS)
    with pytest.raises(ArgumentError, match="another comparison") as caught:
        run_compare(TinyTask(), RECIPES[:1], out=out, **{**OPTIONS, **change})
    assert words in str(caught.value)
    with pytest.raises(ArgumentError, match="task rows: 256 there, 200 asked for"):
        run_compare(TinyTask(rows=200), RECIPES[:1], out=out, **OPTIONS)


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="thesis"):
        run_compare(TinyTask(), RECIPES[:1], out=tmp_path / "full", **OPTIONS)
    with pytest.raises(ArgumentError, match="is a file"):
        run_compare(TinyTask(), RECIPES[:1], out=tmp_path / "full" / "thesis.txt", **OPTIONS)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.sqlite").write_text("no database at all, but long enough to look at" * 40)
    with pytest.raises(CheckpointError, match="cannot be opened as results"):
        run_compare(TinyTask(), RECIPES[:1], out=tmp_path / "damaged", **OPTIONS)


def test_a_text_that_meant_another_method_is_refused(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    run_compare(TinyTask(), ["lora(rank=2)"], out=out, **OPTIONS)
    from rankwise.lab import arguments

    monkeypatch.setattr(arguments, "compose", lambda text: __import__("rankwise").compose("lora(rank=1)"))
    with pytest.raises(ArgumentError, match="stood for another method"):
        run_compare(TinyTask(), ["lora(rank=2)"], out=out, **OPTIONS)
