"""Opening adapters of rankwise and PEFT: on their base, or without it where the update does not depend on the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core import checkpoint
from rankwise.core.checkpoint import JSON_NAME, load_
from rankwise.core.errors import ArgumentError, CheckpointError, shorten
from rankwise.core.handle import Handle
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Additive
from rankwise.core.recipe import Recipe
from rankwise.lab.models import CAUSAL, IMAGE, KINDS, TEXT, load_model, resolve
from rankwise.lab.runs import Origin, is_adapter, origin_of


def check_adapter(folder: Path) -> None:
    """Makes sure that a folder is an adapter.

    Raises:
        CheckpointError: it is not; says what is there.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if not is_adapter(folder):
        held = sorted(entry.name for entry in folder.iterdir())
        unfinished = any(name.startswith("checkpoint-") for name in held)
        hint = " Its run is not finished: give the same train command again." if unfinished else ""
        raise CheckpointError(f"{folder} holds no adapter of rankwise or PEFT, but {shorten(held) or 'nothing'}.{hint}")


def base_of(folders: list[Path], base: str | None, kind: str | None = None) -> tuple[nn.Module, Origin]:
    """The base model that adapters belong to: the named one, or the one that their runs recorded.

    Raises:
        ArgumentError: nothing is recorded and none is named, or the adapters were trained on different ones.
    """
    origins = [origin_of(folder) for folder in folders]
    known = [origin for origin in origins if origin is not None]
    if base is None and (not known or len({origin.model for origin in known}) > 1):
        said = (
            f"name different bases ({', '.join(sorted({o.model for o in known}))})"
            if known
            else "do not say what they belong to"
        )
        raise ArgumentError(f"{shorten([str(folder) for folder in folders])} {said}; pass the base with --base MODEL")
    model_name = base if base is not None else known[0].model
    task = kind or (known[0].kind if known else _kind_of(model_name, folders[0]))
    if task not in KINDS:
        raise ArgumentError(f"--task is one of {', '.join(KINDS)}, not {task!r}")
    labels = known[0].labels if known and known[0].labels else _label_names(folders[0])
    loaded = load_model(model_name, task, labels or None)
    return loaded.model, Origin(model=model_name, kind=task, labels=tuple(labels))


def put_on(model: nn.Module, folder: Path, name: str | None = None, *, any_base: bool = False) -> Handle:
    """Puts a saved adapter, of rankwise or PEFT, onto its base, not to be trained."""
    if (folder / JSON_NAME).is_file():
        return load_(model, folder, name=name, trainable=False, any_base=any_base)
    from rankwise.interop import from_peft

    return from_peft(model, folder, name=name or "default", trainable=False)


def updates_of(folder: Path) -> tuple[dict[str, Operator], dict[str, tuple[Tensor, Tensor]]]:
    """Site -> update, and site -> (B, A) where there are such factors, without the base.

    Raises:
        CheckpointError: the update depends on the base (DoRA, full weights, …), or a convolution's sizes are not in the file.
    """
    check_adapter(folder)
    if not (folder / JSON_NAME).is_file():
        from rankwise.interop import read_peft

        pairs = read_peft(folder)
        return dict(pairs), {site: (pair.B, pair.A) for site, pair in pairs.items()}
    description, tensors = checkpoint.read(folder)
    recipe = Recipe.from_json(description["recipe"])
    sites: dict[str, Any] = description["sites"]
    other = sorted({part["layout"] for part in sites.values()} - {"linear"})
    if not issubclass(recipe.parameterization.factory, Additive) or other:  # type: ignore[arg-type]
        why = (
            f"layers of kind {', '.join(other)}"
            if other
            else f"what {recipe.parameterization.name} does depends on the weights"
        )
        raise CheckpointError(f"{folder} cannot be read without the model it was trained on ({why}); pass --base MODEL")
    handle = load_(_skeleton(sites, description["auxiliary"], tensors), folder, trainable=False, any_base=True)
    return handle.updates(), factors_of(handle)


def factors_of(handle: Handle) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> (B, A) as they are trained, the scale left out, where the parameterization has those two roles."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for site in handle.targets:
        roles = handle.parameterization(site).roles()
        if "A" in roles and "B" in roles:
            found[site] = (roles["B"].detach(), roles["A"].detach())
    return found


def _skeleton(sites: Mapping[str, Any], auxiliary: list[str], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of zero weights that has the adapter's layers and nothing else."""
    root = nn.Module()
    for site, sizes in sites.items():
        owner = _owner(root, site.split(".")[:-1])
        layer = nn.Linear(int(sizes["n"]), int(sizes["m"]), bias=False)
        nn.init.zeros_(layer.weight)
        owner.add_module(site.rpartition(".")[2], layer)
    for key in auxiliary:
        owner = _owner(root, key.split(".")[:-1])
        owner.register_parameter(key.rpartition(".")[2], nn.Parameter(torch.zeros_like(tensors[key])))
    return root


def _owner(root: nn.Module, path: list[str]) -> nn.Module:
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _label_names(folder: Path) -> tuple[str, ...]:
    """Stand-ins for the names of the classes, as many as the saved head has rows; none without a head."""
    if not (folder / JSON_NAME).is_file():
        return ()
    description, tensors = checkpoint.read(folder)
    heads = [tensors[key] for key in description["auxiliary"] if tensors[key].dim() == 2]
    return tuple(str(index) for index in range(heads[-1].shape[0])) if heads else ()


def _kind_of(model: str, folder: Path) -> str:
    """The task of an adapter that does not say: with a head of its own it classifies, else it is a language model's."""
    if not _label_names(folder):
        return CAUSAL
    from transformers import AutoConfig

    return IMAGE if hasattr(AutoConfig.from_pretrained(resolve(model)), "image_size") else TEXT
