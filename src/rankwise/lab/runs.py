"""The folder of one run: what it was made with, whether a second command may go on in it, and which base it belongs to.

`run.json` holds every setting that decides the result. A command with the same settings continues the run; one with others is
refused with the differences. Adapters remember their base this way, so that `inspect`, `merge` and `export` find it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.core.checkpoint import JSON_NAME, write_atomically
from rankwise.core.errors import ArgumentError, shorten

RUN, RESULT, COMPARISON = "run.json", "result.json", "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The base that an adapter was trained on, as its run recorded it."""

    model: str
    kind: str
    labels: tuple[str, ...]


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes `out` the folder of a run with these settings, or finds it to be that already.

    Raises:
        ArgumentError: it holds another run (the message names what differs), or something else.
    """
    plain = json.loads(json.dumps(dict(settings)))
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out {out} is a file; choose a folder")
    if (out / RUN).is_file():
        differences = _differences(_read(out / RUN), plain)
        if differences:
            raise ArgumentError(
                f"--out {out} holds another run, which differs in\n"
                + "\n".join(f"    {key}: {old!r} there, {new!r} now" for key, old, new in differences)
                + "\nChoose another folder, or give the same settings to go on with that run"
            )
        return
    strangers = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if strangers:
        raise ArgumentError(f"--out {out} is not empty and holds no {RUN} ({shorten(strangers)}); choose a new or empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / RUN, json.dumps(plain, indent=1, sort_keys=True))
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written ({error})") from error


def keep_result(out: Path, result: Mapping[str, Any]) -> None:
    """Writes what a finished run gave; its presence says that the run is finished."""
    write_atomically(out / RESULT, json.dumps(dict(result), indent=1, sort_keys=True))


def finished(out: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    return _read(out / RESULT) if (out / RESULT).is_file() else None


def origin_of(adapter: Path) -> Origin | None:
    """The base recorded beside an adapter, or above it by a comparison; None where nothing was recorded."""
    folder = adapter.resolve()
    if (folder / RUN).is_file():
        return _origin(_read(folder / RUN), "")
    for parent in list(folder.parents)[:3]:  # a comparison keeps adapters/<recipe>/seed-<n> below itself
        if (parent / COMPARISON).is_file():
            return _origin(dict(_read(parent / COMPARISON).get("settings", {})), "task ")
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of rankwise or PEFT."""
    return (folder / JSON_NAME).is_file() or (folder / "adapter_config.json").is_file()


def _origin(settings: Mapping[str, Any], prefix: str) -> Origin | None:
    try:
        model, kind = str(settings[f"{prefix}model"]), str(settings[f"{prefix}kind"])
    except KeyError:
        return None
    return Origin(model=model, kind=kind, labels=tuple(settings.get(f"{prefix}labels", ())))


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is damaged ({error}); choose another folder") from error
    if not isinstance(held, dict):
        raise ArgumentError(f"{path} holds no settings; choose another folder")
    return held


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    nothing = "nothing"
    keys = sorted({*old, *new})
    return [
        (key, old.get(key, nothing), new.get(key, nothing)) for key in keys if old.get(key, nothing) != new.get(key, nothing)
    ]
