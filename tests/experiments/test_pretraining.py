"""The pretraining table in small: every method trains, rows are kept, the page and its figure are whole."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise
from experiments import pretraining, running
from experiments.language import Corpus, Size, batch_at, beside, corpus, llama, validation_loss
from experiments.running import Method, Rows
from rankwise.core.errors import ArgumentError, DataError

SIZE = Size(hidden=16, layers=1, intermediate=24, heads=2, vocabulary=300, tokens=8, held=4, steps=2)
METHODS, _ = running.chosen(pretraining.METHODS, None)


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory) -> Size:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"in the beginning were {index} and {index * index}, and the sum of them was good"} for index in range(40)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return replace(SIZE, data=str(file))


@pytest.fixture(scope="module")
def text(size: Size) -> Corpus:
    return corpus(size)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_trains(method: Method, size: Size, text: Corpus) -> None:
    steps: list[int] = []
    row = pretraining.trained_row(method, replace(size, steps=4), text, lambda step, loss: steps.append(step))
    assert steps == [0, 1, 2, 3]
    assert not row["failure"] and len(row["losses"]) == 4
    assert math.isfinite(row["loss"])
    assert row["trained"] > 0 and row["state_bytes"] > 0


def test_most_numbers_are_in_adapted_layers_and_the_model_has_about_ten_million() -> None:
    full = Size()
    model = llama(full, full.vocabulary, 0)
    handle = rankwise.adapt_(model, rankwise.compose("full"), train_also=beside(model))
    assert handle.trained_numbers > 0.85 * sum(tensor.numel() for tensor in model.parameters()) / 2  # frozen ones underneath
    assert 9e6 < sum(tensor.numel() for name, tensor in model.named_parameters() if ".adapter." not in name) < 11e6


def test_adamw_keeps_two_numbers_and_learns(size: Size, text: Corpus) -> None:
    longer = replace(size, steps=40)
    row = pretraining.trained_row(replace(METHODS[0], rate=1e-2), longer, text, lambda step, loss: None)
    assert row["trained"] == 4 * 16**2 + 3 * 16 * 24
    assert row["state_bytes"] == 8 * row["trained"] + 4 * 7  # and a counter for each of seven layers
    untrained = validation_loss(llama(longer, text.vocabulary, 0), text, 4)
    assert row["loss"] < untrained - 0.5


def test_batches_are_the_same_for_every_method_and_differ_between_seeds(size: Size, text: Corpus) -> None:
    assert torch.equal(batch_at(text, size, 3, 0), batch_at(text, size, 3, 0))
    assert not torch.equal(batch_at(text, size, 3, 0), batch_at(text, size, 3, 1))
    assert not torch.equal(batch_at(text, size, 3, 0), batch_at(text, size, 4, 0))


def test_absorbing_keeps_the_function(size: Size, text: Corpus) -> None:
    model = llama(size, text.vocabulary, 0)
    handle = pretraining.adapted(model, "full", 0)
    running.train(
        handle,
        lambda step: model(input_ids=text.held, labels=text.held).loss,
        range(3),
        rate=1e-2,
        rest=1e-2,
        factor=lambda step: 1.0,
    )
    before = validation_loss(model, text, 4)
    running.absorb_(handle)
    assert validation_loss(model, text, 4) == pytest.approx(before, abs=1e-5)
    assert not any(".adapter." in name for name, _ in model.named_parameters())


def test_what_stands_beside_has_a_rate_of_its_own(size: Size, text: Corpus) -> None:
    model = llama(size, text.vocabulary, 0)
    handle = pretraining.adapted(model, "full", 0)
    optimizer = running.optimizer_of(handle, 0.1, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert set(optimizer.param_groups[1]["param_names"]) == set(handle.auxiliary)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 7 + len(handle.auxiliary)


def test_the_rate_rises_falls_and_begins_again() -> None:
    factor = running.factors(100)
    values = [factor(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0) == max(values)
    assert values[10:] == sorted(values[10:], reverse=True) and values[-1] == pytest.approx(0.1, abs=1e-3)
    assert min(values) > 0
    jagged = running.factors(100, interval=20)
    assert jagged(20) == 0.0 and jagged(19) > 0.9 * jagged(23) > 0
    assert running.factors(2)(0) > 0 and running.factors(2, interval=1)(1) > 0


def test_a_finished_row_is_taken_from_disk_and_other_settings_are_not(tmp_path: Path) -> None:
    made: list[str] = []

    def work() -> dict[str, Any]:
        made.append("run")
        return {"loss": 1.5}

    rows = Rows(tmp_path, {"steps": 2})
    assert rows.row(METHODS[0], work) == rows.row(METHODS[0], work) == {"loss": 1.5}
    assert len(made) == 1
    Rows(tmp_path, {"steps": 3}).row(METHODS[0], work)
    rows.row(replace(METHODS[0], rate=1.0), work)
    Rows(tmp_path, {"steps": 2}, fresh=True).row(METHODS[0], work)
    assert len(made) == 4


def test_an_interrupted_table_goes_on(size: Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(pretraining, "Size", lambda steps, data: replace(size, steps=steps, data=data))
    monkeypatch.setattr(pretraining.Size, "steps", 2, raising=False)
    monkeypatch.setattr(pretraining.Size, "data", size.data, raising=False)
    real, calls = pretraining.trained_row, []

    def interrupted(method: Method, *rest: Any) -> Any:
        calls.append(method.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(method, *rest)

    monkeypatch.setattr(pretraining, "trained_row", interrupted)
    page = tmp_path / "docs" / "page.md"
    given = ["--methods", "AdamW", "GaLore", "--steps", "2", "--data", size.data, "--out", str(tmp_path), "--write", str(page)]
    assert pretraining.main(given) == 130
    assert not page.exists()
    assert "goes on from there" in capsys.readouterr().err
    assert pretraining.main(given) == 0
    assert calls == ["AdamW", "GaLore", "GaLore"]
    written = page.read_text()
    assert "full + galore(rank=4" in written and "(page.svg)" in written and "--steps 2" in written
    picture = ElementTree.fromstring(page.with_suffix(".svg").read_text())
    assert "GaLore" in [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]


def test_a_run_that_explodes_is_a_row_and_no_crash(size: Size, text: Corpus) -> None:
    row = pretraining.trained_row(replace(METHODS[0], rate=1e30), replace(size, steps=6), text, lambda step, loss: None)
    assert row["failure"] and row["loss"] == math.inf
    page = pretraining.Table(size, text, METHODS[:1], [row], [], 1e-3).text()
    assert "diverged" in page


def test_unknown_methods_and_too_little_text_are_refused(size: Size, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="GaLore"):
        running.chosen(pretraining.METHODS, ["galore"])
    with pytest.raises(DataError, match="need more"):
        corpus(replace(size, tokens=100_000))
    invented = Method(name="x", recipe="full + nothing_like_it(rank={rank})", rate=1.0)
    assert running.chosen([METHODS[0], invented], None) == ([METHODS[0]], ["x"])
    with pytest.raises(ArgumentError, match="catalog does not have"):
        running.chosen([invented], ["x"])


def test_settings_are_json() -> None:
    json.dumps({**asdict(Size()), **asdict(METHODS[0])})
