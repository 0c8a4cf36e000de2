"""A checkpoint: `adapter.json` (versioned recipe, sites, fingerprint) beside one safetensors file. Nothing is ever unpickled.

The tensor file is named by its content and written first; `adapter.json` is replaced last in one move. So a kill, a full
disk or a power cut leaves the old checkpoint or the new one, never half of each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.core import decisions, merge
from rankwise.core.adapt import build_
from rankwise.core.bank import BANKS
from rankwise.core.errors import CheckpointError, shorten
from rankwise.core.fingerprint import check_fingerprint
from rankwise.core.handle import Handle
from rankwise.core.recipe import Recipe
from rankwise.core.sharding import is_sharded, whole

FORMAT = 1
JSON_NAME = "adapter.json"


def save(handle: Handle, directory: Path) -> Path:
    """Writes a handle's adapter into a folder; an older adapter there is replaced only when the new one is whole.

    Where training sharded the tensors (FSDP), every process must call this: they are gathered, and the first process writes.

    Raises:
        CheckpointError: the folder holds something else, or the disk is full. What was there stays.
    """
    trained = trained_tensors(handle)
    tensors = {key: whole(tensor.detach()).cpu().contiguous() for key, tensor in trained.items()}
    sites = {
        site: {
            "m": target.m,
            "n": target.n,
            "layout": target.layout.kind,
            "rank": handle.parameterization(site).rank,
            "absorbed": handle.parameterization(site).absorbed,
        }
        for site, target in handle.targets.items()
    }
    description = {
        "format": FORMAT,
        "recipe": handle.recipe.to_json(),
        "name": handle.name,
        "seed": handle.seed,
        "sites": sites,
        "auxiliary": sorted(handle.auxiliary),
        "bank": None if handle.bank is None else handle.bank.describe(),
        "fingerprint": dict(handle.fingerprint()),
    }
    if not any(is_sharded(tensor) for tensor in trained.values()):
        return write(directory, description, tensors)
    try:  # every process has gathered the whole tensors; one writes, the others wait for it
        return write(directory, description, tensors) if torch.distributed.get_rank() == 0 else directory
    finally:
        torch.distributed.barrier()


def write(directory: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes description and tensors so that a reader finds the old pair or the new one."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; choose a folder")
    temporary = directory / f".writing-{os.getpid()}.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        content = hash_file(temporary)
        final = directory / f"adapter-{content[:12]}.safetensors"
        os.replace(temporary, final)
        text = json.dumps({**description, "tensors": final.name, "sha256": content}, indent=1, sort_keys=True)
        write_atomically(directory / JSON_NAME, text)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{directory} could not be written ({error}); what was there before is still whole") from error
    for old in directory.glob("adapter-*.safetensors"):
        if old.name != final.name:
            old.unlink()
    return directory


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old text or the new one."""
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        with temporary.open("w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads and checks a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, foreign or newer files.
    """
    path = directory / JSON_NAME
    if not path.is_file():
        hint = (
            " It looks like a PEFT adapter: load it with rankwise.interop.from_peft; handle.save makes it one of ours."
            if (directory / "adapter_config.json").is_file()
            else ""
        )
        raise CheckpointError(f"{directory} holds no {JSON_NAME}, so it is no rankwise adapter.{hint}")
    try:
        description = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    version = description.get("format") if isinstance(description, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointError(f"{path} has no format number; it was not written by rankwise")
    if version > FORMAT:
        raise CheckpointError(f"{path} has format {version}, this rankwise reads up to {FORMAT}; upgrade rankwise to load it")
    name = str(description.get("tensors", ""))
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{path} names the tensor file {name!r}, which is not a plain safetensors name in its folder")
    file = directory / name
    if not file.is_file():
        raise CheckpointError(f"{path} names {name}, which is not in {directory}; copy the whole folder")
    if hash_file(file) != description.get("sha256"):
        raise CheckpointError(f"{file} is damaged: its content is not what {JSON_NAME} recorded. Copy or download it again")
    return description, read_tensors(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        CheckpointError: it is not one, or damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it is truncated, damaged or of another kind. "
            "rankwise reads weights from safetensors only"
        ) from error


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    trainable: bool = True,
    any_base: bool = False,
    binding: str = "path",
) -> Handle:
    """Puts a saved adapter onto a model, in place.

    Args:
        model: the base it was trained on, with fresh or other adapters.
        directory: what `handle.save` wrote.
        name: for the adapter here. Default: the one it was saved under.
        trainable: whether its trained tensors require gradients, for going on training.
        any_base: skip the check that the base is the one it was trained on.
        binding: as for `adapt_`.

    Raises:
        CheckpointError: damaged files, keys or sites that do not fit; nothing is left on the model then.
        FingerprintError: another base.
    """
    folder = Path(directory)
    description, tensors = read(folder)
    try:
        recipe = Recipe.from_json(description["recipe"])
        sites: dict[str, Any] = description["sites"]
        auxiliary: list[str] = description["auxiliary"]
        stored_name, seed = str(description["name"]), int(description["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / JSON_NAME} lacks {error}; it is damaged") from error
    _check_sites(model, sites, folder)
    handle = build_(
        model,
        recipe,
        lambda candidate, _: candidate in sites,
        None,
        name or stored_name,
        seed,
        train_also=sorted({owner.rpartition(".")[0] for owner in auxiliary}),
        binding=binding,
        stored=description,
    )
    try:
        if not any_base:
            check_fingerprint(description["fingerprint"], handle.fingerprint(), source=str(folder))
        if handle.bank is not None:
            handle.bank.check(description["bank"] or {})
        _fill(handle, tensors, sites, folder)
    except BaseException:
        handle.detach_()
        raise
    if not trainable:
        for block in handle.blocks().values():
            for parameter in block.values():
                parameter.requires_grad_(False)
    return handle


def _check_sites(model: nn.Module, sites: Mapping[str, Any], folder: Path) -> None:
    modules = dict(model.named_modules())
    missing = [site for site in sites if site not in modules]
    if missing:
        raise CheckpointError(
            f"{folder} adapts {len(sites)} layers, {len(missing)} of which are not in this model ({shorten(missing)}); "
            "it was trained on a model with other layers"
        )


@torch.no_grad()
def _fill(handle: Handle, tensors: Mapping[str, Tensor], sites: Mapping[str, Any], folder: Path) -> None:
    for site, stored in sites.items():
        target = handle.targets[site]
        if (target.m, target.n) != (stored["m"], stored["n"]):
            raise CheckpointError(
                f"{folder}: {site} is {target.m}×{target.n} here and {stored['m']}×{stored['n']} in the file; another base?"
            )
        entry = handle.parameterization(site)
        own = {
            key.removeprefix(f"{site}."): tuple(tensor.shape) for key, tensor in tensors.items() if key.startswith(f"{site}.")
        }
        handle.make_room(site, own)
        if 0 <= int(stored["rank"]) < entry.rank:
            decisions.resize(entry, torch.arange(entry.rank) < int(stored["rank"]), None)
        for part in ("carried_B", "carried_A"):
            if f"{site}.{part}" in tensors:
                setattr(entry, part, torch.zeros_like(tensors[f"{site}.{part}"], device=target.parameter().device))
    expected = trained_tensors(handle)
    unused, unfilled = sorted(set(tensors) - set(expected)), sorted(set(expected) - set(tensors))
    if unused or unfilled:
        raise CheckpointError(
            f"{folder} does not fit: {len(unused)} tensors of the file have no place here ({shorten(unused) or 'none'}), "
            f"{len(unfilled)} places got no tensor ({shorten(unfilled) or 'none'})"
        )
    for key, place in expected.items():
        if place.shape != tensors[key].shape:
            raise CheckpointError(f"{folder}: {key} is {tuple(tensors[key].shape)} in the file, {tuple(place.shape)} here")
        place.copy_(tensors[key])
    for site, stored in sites.items():
        entry = handle.parameterization(site)
        if stored["absorbed"]:
            if entry.carried() is None and entry.replacement is None:
                raise CheckpointError(f"{folder}: {site} is marked as absorbed, but the file has nothing that could be")
            entry.absorbed = True
            merge.rewrite(handle.targets[site])
        entry.filled(handle.targets[site].matrix())


def trained_tensors(handle: Handle) -> dict[str, Tensor]:
    """Key -> tensor of everything that defines the adapter: trained, frozen and carried parts, shared ones once."""
    tensors: dict[str, Tensor] = {}
    for site in handle.targets:
        for key, tensor in handle.parameterization(site).state_dict().items():
            tensors[f"{site}.{key}"] = tensor
    if handle.bank is not None:
        tensors |= {f"{BANKS}.{key}": tensor for key, tensor in handle.bank.state_dict().items()}
    named = dict(handle.model.named_parameters(remove_duplicate=False))
    return tensors | {name: named[name] for name in handle.auxiliary}
