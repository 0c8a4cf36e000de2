"""The compact form of a trained VB-LoRA: which vectors every piece mixes and how, without the logits that lost.

Per piece `top` numbers of vectors, in the narrowest integers that hold them, and the first top - 1 weights (the last is what is
missing to one), beside the bank. A loaded compact form gives the same outputs and refuses to train: the other logits are gone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core import checkpoint
from rankwise.core.errors import ArgumentError, CheckpointError
from rankwise.core.handle import Handle
from rankwise.parameterizations.vector_bank import VectorBank, chosen

LOGITS = ("logits_A", "logits_B")


def save_compact(handle: Handle, directory: str | Path) -> Path:
    """Writes the compact form of a VB-LoRA adapter into a folder.

    Raises:
        ArgumentError: the adapter is another one.
    """
    if handle.recipe.parameterization.name != VectorBank.__name__:
        raise ArgumentError(f"the compact form is one of vblora; {handle.recipe.name!r} is saved with handle.save")
    with tempfile.TemporaryDirectory() as folder:
        handle.save(folder)
        description, tensors = checkpoint.read(Path(folder))
    top, vectors = handle.recipe.parameterization.arguments.get("top", 2), description["bank"]["sizes"]["vectors"][0]
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        site, _, role = key.rpartition(".")
        if role in LOGITS:
            ids, weights = chosen(tensor, top)
            kept[f"{site}.{role}.ids"] = ids.to(_integers(vectors)).contiguous()  # (…, top)
            kept[f"{site}.{role}.weights"] = weights[..., :-1].contiguous()  # (…, top - 1)
        else:
            kept[key] = tensor
    description = {**description, "compact": {"vectors": vectors}}
    return checkpoint.write(Path(directory), description, kept)


def load_compact(model: nn.Module, directory: str | Path, **options: Any) -> Handle:
    """Puts a compact adapter onto a model, for inference.

    Args:
        model: the base it was trained on.
        directory: what `save_compact` wrote.
        **options: name, any_base and binding of `rankwise.load_`.

    Raises:
        CheckpointError: the folder holds no compact form.
    """
    description, tensors = checkpoint.read(Path(directory))
    if "compact" not in description:
        raise CheckpointError(f"{directory} holds a whole adapter; load it with rankwise.load_")
    vectors = int(description["compact"]["vectors"])
    full = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0].rpartition(".")[2] not in LOGITS}
    for key in tensors:
        place, _, part = key.rpartition(".")
        if part == "ids" and place.rpartition(".")[2] in LOGITS:
            full[place] = logits_of(tensors[key], tensors[f"{place}.weights"], vectors)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write(Path(folder), {key: value for key, value in description.items() if key != "compact"}, full)
        handle = checkpoint.load_(model, folder, trainable=False, **options)
    for site in handle.targets:
        entry: Any = handle.parameterization(site)
        entry.compact = True
    return handle


def logits_of(ids: Tensor, weights: Tensor, vectors: int) -> Tensor:
    """Logits (…, h) that choose these vectors with these weights: the logarithms there, the least number elsewhere."""
    last = 1 - weights.sum(-1, keepdim=True)  # may round below zero
    whole = torch.cat([weights, last], dim=-1).clamp_min(torch.finfo(weights.dtype).tiny)  # (…, top)
    empty = torch.full((*ids.shape[:-1], vectors), torch.finfo(weights.dtype).min, dtype=weights.dtype)  # (…, h)
    return empty.scatter(-1, ids.long(), whole.log())


def _integers(count: int) -> torch.dtype:
    """The narrowest integers that number so many vectors."""
    return torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32
