"""The command line: examples that parse, errors without a traceback, and train, inspect, merge and export in a row."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

import rankwise
from rankwise import catalog
from rankwise.cli import MENDABLE, app, run, spread
from rankwise.lab.models import load_model
from rankwise.lab.open import base_of, put_on
from tests.lab.tiny_models import jsonl, reviews, tiny_bert, tiny_llama

COMMANDS = ("compare", "intrinsic-dimension", "train", "inspect", "merge", "export", "methods")


def test_methods_lists_the_whole_catalog_and_tells_more_of_one(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["methods"]) == 0
    listed = capsys.readouterr().out
    assert [slug for slug in catalog.names() if not re.search(rf"^{slug}\b", listed, re.MULTILINE)] == []
    for slug in catalog.names():
        assert run(["methods", slug]) == 0
        told = capsys.readouterr().out
        assert catalog.entry(slug).title in told
        assert catalog.entry(slug).formula.split()[0] in told
    assert run(["methods", "dorra"]) == MENDABLE
    assert "Did you mean 'dora'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name: str, capsys, monkeypatch) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    example = re.search(r"`(rankwise .*?)`", command.help or "")
    assert example is not None
    words = shlex.split(example.group(1))
    assert words[:2] == ["rankwise", name]
    context = command.make_context(name, spread(words[2:]))
    assert context.params
    monkeypatch.setenv("COLUMNS", "200")
    assert run([name, "--help"]) == 0
    assert "An example:" in capsys.readouterr().out


def test_options_with_several_values_are_spread() -> None:
    assert spread(["compare", "--recipes", "a", "b + c", "--lrs", "1e-4", "1e-3", "--steps", "4"]) == [
        "compare", "--recipes", "a", "--recipes", "b + c", "--lrs", "1e-4", "--lrs", "1e-3", "--steps", "4",
    ]  # fmt: skip


def test_what_a_user_can_mend_comes_without_a_traceback(tmp_path: Path, capsys) -> None:
    bert, file = str(tiny_bert(tmp_path / "bert")), str(reviews(tmp_path / "a.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    cases = [
        (["train", "--model", bert], "train needs --data"),
        (["train", "-m", bert, "-d", str(tmp_path / "empty.jsonl")], "is empty"),
        (["train", "-m", bert, "-d", file, "--column", "text"], "not of the form part=column"),
        (["train", "-m", bert, "-d", file, "-r", "lorra", "--out", str(tmp_path / "o")], "Did you mean 'lora'"),
        (["train", "-m", bert, "-d", file, "--where", "qery", "--out", str(tmp_path / "o")], "Did you mean 'query'"),
        (["train", "-m", "packaged:minilmm", "-d", file], "Did you mean 'minilm'"),
        (["inspect", str(tmp_path)], "holds no adapter"),
        (["merge", str(tmp_path)], "merge needs two or more adapters"),
        (["export", str(tmp_path), "--to", "onnx"], "there is: peft"),
        (["compare", "--preset", "dmo"], "Did you mean 'demo'"),
    ]
    for arguments, told in cases:
        assert run(arguments) == MENDABLE, arguments
        shown = capsys.readouterr().err
        assert told in shown.replace("\n", " ")
        assert "Traceback" not in shown
    assert not (tmp_path / "o").exists()
    assert run(["train", "--stepz", "3"]) == 2
    assert "--steps" in capsys.readouterr().err


def train(model: str, data: str, out: Path, *more: str) -> list[str]:
    options = ["--steps", "6", "--batch-size", "4", "--lr", "1e-2", "--retention", "none", "--device", "cpu"]
    return ["train", "-m", model, "-d", data, "-r", "lora(rank=2)", "--out", str(out), *options, *more]


def test_train_inspect_merge_and_export_in_a_row(tmp_path: Path, capsys) -> None:
    bert, file = str(tiny_bert(tmp_path / "bert")), str(reviews(tmp_path / "a.jsonl"))
    for seed in ("0", "1"):
        assert run(train(bert, file, tmp_path / f"run{seed}", "--seed", seed)) == 0
    assert "accuracy" in capsys.readouterr().out
    assert run(train(bert, file, tmp_path / "run0", "--seed", "0")) == 0
    assert "finished before" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path / "run0"), "--base", bert]) == 0
    assert (tmp_path / "run0" / "inspect.html").is_file()

    parts = [str(tmp_path / "run0"), str(tmp_path / "run1")]
    merging = ["merge", *parts, "--weights", "0.5,0.25", "--out", str(tmp_path / "merged")]
    capsys.readouterr()
    assert run(merging) == MENDABLE
    assert "classifier" in (told := capsys.readouterr().err)
    assert "--head (1 for" in told.replace("\n", " ")
    assert run([*merging, "--head", "2"]) == 0
    assert run(["export", str(tmp_path / "merged"), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0

    folders = [tmp_path / name / "adapter" for name in ("run0", "run1", "merged")]
    model, origin = base_of(folders, None)
    assert (origin.model, origin.labels) == (bert, ("minus", "plus"))
    one, two, merged = (put_on(model, folder, name=f"a{index}") for index, folder in enumerate(folders))
    for site in merged.targets:
        expected = 0.5 * one.update_of(site).dense() + 0.25 * two.update_of(site).dense()
        assert torch.allclose(merged.update_of(site).dense(), expected, atol=1e-6)
    there = rankwise.interop.from_peft(base_of(folders, None)[0], tmp_path / "peft")
    for site in merged.targets:
        assert torch.allclose(there.update_of(site).dense(), merged.update_of(site).dense(), atol=1e-6)
    heads = [dict(base.named_parameters())["classifier.weight"] for base in (there.model, two.model)]
    assert torch.equal(*heads)


def test_iteris_reads_the_data_of_every_adapter(tmp_path: Path, capsys) -> None:
    llama = str(tiny_llama(tmp_path / "llama"))
    texts = [["the day was good and one of two is bad"], ["three and four was the sum of the night"]]
    files = [str(jsonl(tmp_path / f"{index}.jsonl", [{"text": t} for t in text * 60])) for index, text in enumerate(texts)]
    for index, file in enumerate(files):
        assert run(train(llama, file, tmp_path / f"run{index}")) == 0
    merging = ["merge", str(tmp_path / "run0"), str(tmp_path / "run1"), "--method", "iteris", "--out", str(tmp_path / "merged")]
    capsys.readouterr()
    assert run([*merging, "--data", files[0]]) == MENDABLE
    assert "pass --data 2 times" in capsys.readouterr().err.replace("\n", " ")
    assert run([*merging, "--data", files[0], "--data", files[1]]) == 0
    assert "iteris of 2 adapters" in capsys.readouterr().out
    handle = put_on(load_model(llama, "causal-lm").model, tmp_path / "merged" / "adapter")
    assert all(bool(update.dense().abs().sum()) for update in handle.updates().values())
