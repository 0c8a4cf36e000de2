"""Reading JSONL, JSON, CSV, TSV and Parquet files, and folders of them or of the `datasets` library."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.core.errors import DataError, shorten

TRAIN_NAMES, TEST_NAMES = ("train",), ("validation", "valid", "dev", "eval", "test")
Rows = list[dict[str, Any]]


def read_any(path: Path) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, int]:
    """Rows to train on, rows to evaluate on if the source has a split, and the number of the first row for messages.

    Raises:
        DataError: it cannot be read.
    """
    if path.is_file():
        return read_file(path), None, 1
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return (*_datasets_folder(path), 1)
    files = {entry.stem: entry for entry in sorted(path.iterdir()) if entry.suffix in READERS}
    train = next((files[name] for name in TRAIN_NAMES if name in files), None)
    if train is None:
        held = sorted(entry.name for entry in path.iterdir())
        raise DataError(
            f"{path} is no folder of the datasets library and has no train file ({', '.join(READERS)}); it holds "
            f"{shorten(held) or 'nothing'}"
        )
    test = next((files[name] for name in TEST_NAMES if name in files), None)
    return read_file(train), None if test is None else read_file(test), 1


def read_file(path: Path) -> Rows:
    """The rows of one file.

    Raises:
        DataError: an unknown ending, no rows, or a row that cannot be read.
    """
    if path.suffix not in READERS:
        raise DataError(f"{path}: rankwise reads {', '.join(READERS)}, not {path.suffix or 'files without an ending'}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        rows = READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return [_with_images(row, path.parent) for row in rows]


def _jsonl(path: Path) -> Rows:
    rows: Rows = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}") from error
            rows.append(_mapping(row, path, number))
    return rows


def _json(path: Path) -> Rows:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if "Extra data" in error.msg:  # one object per line under the other ending
            return _jsonl(path)
        raise DataError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from error
    if not isinstance(held, list):
        raise DataError(f"{path} is a JSON {type(held).__name__}; a list of rows is needed")
    return [_mapping(row, path, number) for number, row in enumerate(held, start=1)]


def _separated(delimiter: str) -> Callable[[Path], Rows]:
    def read(path: Path) -> Rows:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            try:
                return [_complete(row, path, number) for number, row in enumerate(reader, start=1)]
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num} cannot be read: {error}") from error

    return read


def _complete(row: dict[Any, Any], path: Path, number: int) -> dict[str, Any]:
    if None in row:
        raise DataError(f"{path}, row {number} has {len(row[None])} values more than the header has columns")
    return {column: value for column, value in row.items() if value is not None}


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet is read with pyarrow, which is not installed:\n    pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


def _mapping(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{path}, row {number} is a {type(row).__name__}; a row is an object such as {{"text": …, "label": …}}')
    return row


def _with_images(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Image columns that hold a path, as paths from the file's own folder."""
    for column in ("image", "img", "image_path", "file_name"):
        value = row.get(column)
        if isinstance(value, str) and value:
            row[column] = folder / value
    return row


def _datasets_folder(path: Path) -> tuple[Sequence[Any], Sequence[Any] | None]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise DataError(
            f"{path} is a folder of the datasets library, which is not installed:\n    pip install datasets"
        ) from error
    try:
        held: Any = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read by the datasets library: {error}") from error
    if not isinstance(held, DatasetDict):
        return _NamedLabels(held), None
    train = next((held[name] for name in TRAIN_NAMES if name in held), None)
    if train is None:
        raise DataError(f"{path} has the splits {', '.join(map(str, held))}; one named 'train' is needed")
    test = next((held[name] for name in TEST_NAMES if name in held), None)
    return _NamedLabels(train), None if test is None else _NamedLabels(test)


class _NamedLabels(Sequence[Any]):
    """Rows of a `datasets` table, read when asked for, with class numbers given back as names."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.names = {column: kind.names for column, kind in table.features.items() if hasattr(kind, "names")}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = dict(self.table[index])
        return row | {column: names[row[column]] for column, names in self.names.items() if isinstance(row[column], int)}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
