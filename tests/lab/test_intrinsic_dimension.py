"""The search for the intrinsic dimension: its rule, a problem whose answer is known, the command with its files and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rankwise.cli import run as main
from rankwise.core.errors import ArgumentError
from rankwise.lab import tasks
from rankwise.lab.intrinsic_dimension import log_spaced, search
from rankwise.parameterizations.intrinsic import Dense, Fastfood
from tests.lab.tiny_task import TinyTask


def test_the_search_stops_at_the_smallest_that_is_enough() -> None:
    asked: list[int] = []

    def score(dimension: int) -> float | None:
        asked.append(dimension)
        return None if dimension == 2 else float(dimension)

    assert search(score, [1, 2, 4, 8, 16], 5.0) == 8
    assert asked == [1, 2, 4, 8]
    assert search(score, [1, 2], 5.0) is None
    for bad in ([], [4, 2], [2, 2], [0, 1]):
        with pytest.raises(ArgumentError, match="ascending order"):
            search(score, bad, 1.0)


def test_dimensions_are_spaced_by_ratio() -> None:
    assert log_spaced(10, 10_000, 7) == [10, 32, 100, 316, 1000, 3162, 10_000]
    assert log_spaced(1, 3, 10) == [1, 2, 3]
    assert log_spaced(5, 5, 1) == [5]
    with pytest.raises(ArgumentError, match="upwards"):
        log_spaced(10, 1, 3)


@pytest.mark.parametrize("kind", [Dense, Fastfood])
def test_the_toy_whose_dimension_is_ten(kind) -> None:
    """1000 numbers in ten groups of 100 whose sums must be 1 … 10: solvable from ten dimensions on, not from nine."""
    target = torch.arange(1, 11, dtype=torch.float64)  # (10,)

    def score(dimension: int) -> float:
        projection = kind(1000, dimension, 3)
        P = torch.stack([projection.project(e) for e in torch.eye(dimension, dtype=torch.float64)], dim=1)  # (1000, d)
        sums = P.reshape(10, 100, dimension).sum(1)  # (10, d)
        found = torch.linalg.lstsq(sums, target[:, None], driver="gelsd").solution
        return -float((sums @ found - target[:, None]).norm())

    assert score(9) < -0.1
    assert search(score, [1, 4, 8, 9, 10, 11], -1e-8) == 10


@pytest.fixture
def tiny(monkeypatch) -> TinyTask:
    task = TinyTask()
    monkeypatch.setattr(tasks, "make_task", lambda *names, **options: task)
    return task


def arguments(out: Path, *more: str) -> list[str]:
    options = ["intrinsic-dimension", "--model", "m", "--data", "d", "--steps", "8", "--seeds", "2", "--out", str(out)]
    return [*options, "--dimensions", "4", "16", "64", "--rates", "2", *more]


def test_the_command_measures_writes_and_goes_on(tiny: TinyTask, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(arguments(out)) == 0
    said = capsys.readouterr().out
    assert "of full training's" in said
    found = json.loads((out / "intrinsic-dimension.json").read_text())
    assert [dimension for dimension, _ in found["scores"]] == [4, 16, 64]
    assert found["target"] == pytest.approx(0.9 * found["full"])
    reached = [dimension for dimension, score in found["scores"] if score is not None and score >= found["target"]]
    assert found["dimension"] == (reached[0] if reached else None)
    page = (out / "intrinsic-dimension.html").read_text()
    assert "full training" in page and "default-src 'none'" in page
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(len(row["sweep"]) > 0 and row["finished"] == 2 for row in rows)  # a rate per dimension, every seed

    def refuse(what: str) -> None:
        assert not what.startswith("batch 1"), "nothing is trained again"

    tiny.interrupt = refuse
    assert main(arguments(out, "--share", "0.5")) == 0  # another share is another reading of the same runs
    assert json.loads((out / "intrinsic-dimension.json").read_text())["share"] == 0.5


def test_bad_input_is_told_in_one_line(tiny: TinyTask, tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path / "a", "--share", "1.5")) == 2
    assert "share is above 0" in capsys.readouterr().err
    assert main(arguments(tmp_path / "b", "--projection", "wavelet")) == 2
    assert "fastfood, dense, sparse" in capsys.readouterr().err
    assert main([*arguments(tmp_path / "c"), "--dimensions", "100000"]) == 2
    assert "1 to 256 for 240 numbers" in capsys.readouterr().err
