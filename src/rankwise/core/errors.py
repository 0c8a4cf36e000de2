"""Every error a user can meet, as one tree.

    RankwiseError
    ├── RecipeError         a recipe is illegal here; carries every `Problem` at once
    ├── ArgumentError       an unknown name or argument, or a value out of range
    ├── TargetError         what to adapt was not found, or cannot be adapted
    ├── StatisticsError     a statistic was not collected, or the data cannot give it
    ├── ActivationError     an adapter name or a combination of adapters is not there
    ├── CheckpointError     a file is damaged, foreign, newer, or does not fit the model
    │   └── FingerprintError    the base model is not the one the adapter was trained on
    ├── MergeError          merging or unmerging is refused
    ├── ExportError         the update cannot be written exactly in the format asked for
    ├── TrainingError       training cannot go on (NaN, a forgotten call)
    ├── DataError           a data file or a row of it cannot be used
    └── ModelError          a model cannot be found or loaded

All of them are errors a user can mend: the message says what was asked, what was found, and the way out. A fault of the
library itself raises an ordinary exception with "this is a bug in rankwise" in its text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class RankwiseError(Exception):
    """Base of all errors that a user can mend."""


class ArgumentError(RankwiseError):
    """An unknown name or argument, or a value out of range."""


class TargetError(RankwiseError):
    """What to adapt was not found, or cannot be adapted this way."""


class StatisticsError(RankwiseError):
    """A statistic was not collected, or the data cannot give it."""


class ActivationError(RankwiseError):
    """An adapter name or a combination of adapters is not there."""


class CheckpointError(RankwiseError):
    """A checkpoint is damaged, foreign, newer than this library, or does not fit the model."""


class FingerprintError(CheckpointError):
    """The base model is not the one that the adapter was trained on."""


class MergeError(RankwiseError):
    """Merging or unmerging is refused."""


class ExportError(RankwiseError):
    """The update cannot be written exactly in the format asked for."""


class TrainingError(RankwiseError):
    """Training cannot go on."""


class DataError(RankwiseError):
    """A data file, or a row of it, cannot be used."""


class ModelError(RankwiseError):
    """A model cannot be found or loaded."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One reason why a recipe is illegal: what a piece needs, what is there, and the way out."""

    piece: str
    needs: str
    has: str
    remedy: str
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.piece} needs {self.needs}; {self.has}.\n    {self.remedy}"
        return f"{shorten(self.sites)}: {text}" if self.sites else text


class RecipeError(RankwiseError):
    """A recipe is illegal on this model; `problems` holds every reason."""

    def __init__(self, recipe: str, problems: Sequence[Problem]) -> None:
        self.recipe = recipe
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        lines = "\n  ".join(str(problem) for problem in problems)
        super().__init__(f"{count} in recipe {recipe!r}\n  {lines}")

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.recipe, self.problems)


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Joins names for a message, naming the first few and counting the rest."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, or all of them if they are few."""
    known = sorted(set(options))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(match) for match in close)}?"
    return f"Known: {shorten(known, 12)}." if known else "Nothing is known here."
