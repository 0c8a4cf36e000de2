"""`from_peft`: a PEFT adapter onto a model, as a rankwise adapter that trains, merges and saves like any other.

Every adapter type of `peft_methods` becomes the catalog's method: LORA `lora`, `rslora` or, with use_dora, `dora`; VERA
`vera`; LOHA `loha`; MISS `bone`; ADALORA `gated_lora` with the directions that are left; the others the method of their name.
What differs between layers becomes `Recipe.ranks` and `Recipe.overrides`; LoRA's alpha_pattern is folded into B, which leaves
the update as it is. A start is never run again, and nothing is read off the weight that the file has. Everything is checked
before the model is touched; shapes that only the built layers tell are checked before the first tensor is filled, and the
adapter is taken off again.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.adapt import build_
from rankwise.core.errors import CheckpointError, FingerprintError, shorten
from rankwise.core.fingerprint import check_fingerprint
from rankwise.core.handle import Handle
from rankwise.core.layouts import ConvLayout
from rankwise.core.recipe import Recipe
from rankwise.core.targets import Target, dequantize, target_of
from rankwise.interop.peft_config import chosen_layers
from rankwise.interop.peft_files import FINGERPRINT, PeftAdapter, read
from rankwise.interop.peft_method import Filling, PeftSite, convolution_trouble


def from_peft(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    trainable: bool = True,
    any_base: bool = True,
    ignore: Sequence[str] = (),
    seed: int = 0,
    binding: str = "path",
) -> Handle:
    """Puts a PEFT adapter onto a model, in place.

    Args:
        model: the plain base model, not wrapped by peft.
        directory: with adapter_config.json and adapter_model.safetensors.
        name: for the adapter here.
        trainable: whether its trained tensors require gradients, for going on training. False also accepts what only
            training would miss: dropouts of a kind that the method has none of here, VB-LoRA's compact form.
        any_base: whether any base with the right layers will do, since PEFT's files do not say which weights they belong to.
            False compares the fingerprint that `to_peft` leaves, else the base's name, and refuses where neither is there.
        ignore: fields of the config that you know to be without effect on this adapter, and "delora_w_norm" for a DeLoRA whose
            stored norms are to stand although this base has others.
        seed: of dropout masks.
        binding: as for `adapt_`.

    Raises:
        CheckpointError: damaged files, tensors or layers that do not fit, or a method that is not supported.
        RecipeError: a layer of this model cannot take the file's sizes.
        FingerprintError: another base.
    """
    adapter = read(Path(directory), ignore=ignore, trainable=trainable)
    targets = _targets(model, adapter)
    owners = _check_whole(model, adapter)
    fillings = {site: _filling(adapter, site, target) for site, target in targets.items()}
    method, folder = adapter.method, adapter.folder
    shared = method.bank(folder, adapter.fields, adapter.shared, targets) if method.bank else {}
    described = {"seed": None, "sizes": {part: list(t.shape) for part, t in shared.items()}, "trained": list(method.trained)}
    handle = build_(
        model,
        _recipe(adapter, fillings),
        lambda site, _: site in targets,
        None,
        name,
        seed,
        train_also=owners,
        binding=binding,
        stored={"bank": described if shared else None},
    )
    try:
        if not any_base:
            _check_base(adapter, handle)
        _fill(handle, folder, fillings, shared)
        named = dict(model.named_parameters())
        with torch.no_grad():
            for key, tensor in adapter.whole.items():
                named[key].copy_(tensor)
    except BaseException:
        handle.detach_()
        raise
    if not trainable:
        for block in [*handle.blocks().values(), *handle.plain_blocks().values()]:
            for parameter in block.values():
                parameter.requires_grad_(False)
    return handle


def _targets(model: nn.Module, adapter: PeftAdapter) -> dict[str, Target]:
    """The layers that the file has tensors for, checked against those that the config names."""
    modules = {name: module for name, module in model.named_modules() if ".adapter." not in f".{name}."}
    missing = [site for site in adapter.sites if site not in modules]
    if missing:
        raise CheckpointError(
            f"{adapter.folder} adapts {len(adapter.sites)} layers, {len(missing)} of which are not in this model "
            f"({shorten(missing)}); it was trained on a model with other layers"
        )
    targets = {}
    for site in adapter.sites:
        target = target_of(site, modules[site])
        if target is None:
            raise CheckpointError(f"{adapter.folder} adapts {site}, which is a {type(modules[site]).__name__} here")
        targets[site] = target
    fitting = [name for name, module in modules.items() if target_of(name, module) is not None]
    unfilled = [name for name in chosen_layers(adapter.folder, adapter.config, fitting) if name not in adapter.sites]
    if unfilled:
        raise CheckpointError(
            f"{adapter.folder}: target_modules names {len(targets) + len(unfilled)} layers of this model, the file has tensors "
            f"for {len(targets)}; nothing for {shorten(unfilled)}. It was trained on a model with fewer layers, or incomplete"
        )
    return targets


def _check_whole(model: nn.Module, adapter: PeftAdapter) -> list[str]:
    """The modules that the file replaces whole; every parameter of theirs must be there in the right shape."""
    owners = sorted({key.rpartition(".")[0] for key in adapter.whole})
    named = dict(model.named_parameters())
    expected = {key for key in named if any(key.rpartition(".")[0] == owner for owner in owners)}
    unused, unfilled = sorted(set(adapter.whole) - expected), sorted(expected - set(adapter.whole))
    if unused or unfilled:
        raise CheckpointError(
            f"{adapter.folder}: of the modules trained whole, {len(unused)} tensors have no place in this model "
            f"({shorten(unused) or 'none'}) and {len(unfilled)} places got no tensor ({shorten(unfilled) or 'none'})"
        )
    for key, tensor in adapter.whole.items():
        if tensor.shape != named[key].shape:
            raise CheckpointError(
                f"{adapter.folder}: {key} is {tuple(tensor.shape)} in the file, {tuple(named[key].shape)} here"
            )
    return owners


def _filling(adapter: PeftAdapter, site: str, target: Target) -> Filling:
    """What the method makes of one layer, once the layer is one that PEFT adapts in this way."""
    parts, letters, kind = adapter.sites[site], adapter.letters[site], target.layout.kind
    method, folder = adapter.method, adapter.folder
    if "base" in parts and not torch.equal(
        parts["base"].to(target.parameter().dtype), dequantize(target.module).detach().cpu()
    ):
        raise CheckpointError(
            f"{folder} brings its own weight for {site}, {tuple(parts['base'].shape)}, which is not this model's "
            f"{tuple(target.parameter().shape)}; resize the model's embeddings as in training and load that weight first"
        )
    if kind not in method.layouts:
        known = ", ".join(sorted(method.layouts))
        raise CheckpointError(f"{folder}: {site} is of kind {kind}; PEFT's {adapter.kind} knows layers of kind {known}")
    trouble = convolution_trouble(target.layout, method.convolutions) if isinstance(target.layout, ConvLayout) else None
    if trouble:
        raise CheckpointError(
            f"{folder}: {site} is a convolution with {trouble}, so its tensors mean something else there than here"
        )
    m, n = letters.get("m", target.m), letters.get("n", target.n)
    if (m, n) != (target.m, target.n):
        raise CheckpointError(f"{folder}: {site} is {target.m}×{target.n} here and {m}×{n} in the file; another base?")
    return method.read(PeftSite(site, target, parts, letters, adapter.fields, folder))


def _recipe(adapter: PeftAdapter, fillings: Mapping[str, Filling]) -> Recipe:
    """The catalog's recipe with the arguments that most layers have; those of the others become ranks and overrides."""
    names = next(iter(fillings.values())).arguments
    common = {name: Counter(filling.arguments[name] for filling in fillings.values()).most_common(1)[0][0] for name in names}
    recipe = adapter.method.recipe(adapter.fields, **common)
    ranks: dict[str, int] = {}
    overrides: dict[str, dict[str, Any]] = {}
    for site, filling in fillings.items():
        other = {name: value for name, value in filling.arguments.items() if value != common[name]}
        if "rank" in other:
            ranks[site] = other.pop("rank")
        if other:
            overrides[site] = other
    return dataclasses.replace(recipe, ranks=ranks, overrides=overrides)


def _check_base(adapter: PeftAdapter, handle: Handle) -> None:
    stored = adapter.metadata.get(FINGERPRINT)
    if stored is not None:
        try:
            hashes = json.loads(stored)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{adapter.folder}: the base's fingerprint in the metadata is damaged ({error})") from error
        check_fingerprint(hashes, handle.fingerprint(), source=str(adapter.folder))
        return
    said = adapter.config.get("base_model_name_or_path")
    here = getattr(getattr(handle.model, "config", None), "_name_or_path", None)
    if not said or said != here:
        raise FingerprintError(
            f"{adapter.folder} says it was trained on {said!r}, this model is {here!r}; pass any_base=True if they are the same"
        )


@torch.no_grad()
def _fill(handle: Handle, folder: Path, fillings: Mapping[str, Filling], shared: Mapping[str, Tensor]) -> None:
    """Puts the tensors into their places, all of which must be there in the right shape."""
    places: dict[str, dict[str, Tensor]] = {}
    for site, filling in fillings.items():
        entry = handle.parameterization(site)
        if filling.prepare is not None:
            filling.prepare(entry)
        buffers = {name.rpartition(".")[2]: tensor for name, tensor in entry.named_buffers()}
        places[site] = {**buffers, **entry.roles()}
        unfilled = set(entry.roles()) - set(filling.tensors)
        here = {role: tuple(place.shape) for role, place in places[site].items()}
        unlike = [
            f"{role} is {tuple(tensor.shape)} in the file and {here.get(role, 'not')} here"
            for role, tensor in filling.tensors.items()
            if here.get(role) != tuple(tensor.shape)
        ]
        if unfilled or unlike:
            unlike += [f"nothing for {role}" for role in sorted(unfilled)]
            raise CheckpointError(
                f"{folder}: the tensors of {site} are not those that the config makes for this layer, {handle.targets[site].m}×"
                f"{handle.targets[site].n}: {'; '.join(unlike)}. The two files belong to different adapters, or to another base"
            )
    for site, filling in fillings.items():
        for role, tensor in filling.tensors.items():
            places[site][role].copy_(tensor)
    bank = handle.bank
    for part, tensor in shared.items():
        assert bank is not None
        bank[part].copy_(tensor)
    for site, target in handle.targets.items():
        handle.parameterization(site).filled(target.matrix())
