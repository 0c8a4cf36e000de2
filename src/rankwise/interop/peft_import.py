"""`from_peft`: a PEFT adapter onto a model, as a rankwise adapter that trains, merges and saves like any other.

LORA becomes `lora` or `rslora`, with use_dora `dora`, and VERA `vera`. Patterns of rank become `Recipe.ranks`; a scale that
the recipe cannot state (alpha_pattern) is folded into B, which leaves the update as it is. Everything is checked before the
model is touched.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from rankwise import catalog
from rankwise.core.adapt import adapt_
from rankwise.core.errors import CheckpointError, FingerprintError, shorten
from rankwise.core.fingerprint import check_fingerprint
from rankwise.core.handle import Handle
from rankwise.core.layouts import ConvLayout, LinearLayout
from rankwise.core.operators import LowRank
from rankwise.core.queries import svd
from rankwise.core.recipe import Recipe
from rankwise.core.targets import Target, dequantize, target_of
from rankwise.interop.peft_config import at_pattern, chosen_layers
from rankwise.interop.peft_files import FINGERPRINT, PeftAdapter, read


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
        trainable: whether its trained tensors require gradients, for going on training.
        any_base: whether any base with the right layers will do, since PEFT's files do not say which weights they belong to.
            False compares the fingerprint that `to_peft` leaves, else the base's name, and refuses where neither is there.
        ignore: fields of the config that you know to be without effect on this adapter.
        seed: of dropout masks.
        binding: as for `adapt_`.

    Raises:
        CheckpointError: damaged files, tensors or layers that do not fit, or a method that is not supported.
        FingerprintError: another base.
    """
    adapter = read(Path(directory), ignore=ignore)
    targets = _targets(model, adapter)
    owners = _check_whole(model, adapter)
    parts = {site: _parts(adapter, site, target) for site, target in targets.items()}
    shared = _shared(adapter, targets)
    recipe = _recipe(adapter, {site: _rank(part) for site, part in parts.items()})
    handle = adapt_(model, recipe, lambda site, _: site in targets, name=name, seed=seed, train_also=owners, binding=binding)
    try:
        if not any_base:
            _check_base(adapter, handle)
        _fill(handle, parts, shared)
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


def _parts(adapter: PeftAdapter, site: str, target: Target) -> dict[str, Tensor]:
    """The tensors of one layer in our shapes: A (r, n), B (m, r) with the scale folded in, magnitude (m,); b (m,), d (r,)."""
    parts = adapter.sites[site]
    if "base" in parts and not torch.equal(
        parts["base"].to(target.parameter().dtype), dequantize(target.module).detach().cpu()
    ):
        raise CheckpointError(
            f"{adapter.folder} brings its own weight for {site}, {tuple(parts['base'].shape)}, which is not this model's "
            f"{tuple(target.parameter().shape)}; resize the model's embeddings as in training and load that weight first"
        )
    if adapter.kind == "VERA":
        sizes = (parts["b"].numel(), target.n)
    else:
        if isinstance(target.layout, ConvLayout):
            _check_convolution(adapter.folder, site, target.layout)
        pair = adapter.factors(site)
        sizes = pair.shape
    if sizes != (target.m, target.n):
        raise CheckpointError(
            f"{adapter.folder}: {site} is {target.m}×{target.n} here and {sizes[0]}×{sizes[1]} in the file; another base?"
        )
    if adapter.kind == "VERA":
        if not isinstance(target.layout, LinearLayout):
            raise CheckpointError(
                f"{adapter.folder}: {site} is of kind {target.layout.kind}; PEFT's VeRA knows linear layers only"
            )
        return {"b": parts["b"], "d": parts["d"]}
    pair = _narrow(pair, min(target.m, target.n))
    found = {"B": pair.B, "A": pair.A}
    return found | {"magnitude": parts["magnitude"].reshape(-1)} if adapter.magnitudes else found


def _check_convolution(folder: Path, site: str, layout: ConvLayout) -> None:
    unlike = convolution_trouble(layout)
    if unlike:
        raise CheckpointError(
            f"{folder}: {site} is a convolution with {unlike}, so its factors mean something else there than here"
        )


def convolution_trouble(layout: ConvLayout) -> str | None:
    """Why PEFT's forward of a convolution is not the convolution with W + B A, or None.

    It runs A without the layer's dilation and padding mode, and with groups lets every group see all channels.
    """
    if layout.groups > 1:
        return f"{layout.groups} groups, whose factors PEFT shapes differently"
    if any(step != 1 for step in layout.dilation):
        return f"dilation {layout.dilation}, which PEFT leaves out of the update"
    if layout.padding_mode != "zeros":
        return f"padding mode {layout.padding_mode!r}, which PEFT leaves out of the update"
    return None


def _narrow(pair: LowRank, most: int) -> LowRank:
    """The same product with at most `most` inner directions: padding with zeros goes first, then an exact SVD."""
    if pair.rank <= most:
        return pair
    used = (pair.B != 0).any(0) & (pair.A != 0).any(1)  # (r,)
    if 0 < int(used.sum()) <= most:
        return LowRank(pair.B[:, used], pair.A[used])
    U, S, Vh = svd(LowRank(pair.B.double(), pair.A.double())).truncated(most)
    return LowRank((U * S).to(pair.B.dtype), Vh.to(pair.A.dtype))


def _shared(adapter: PeftAdapter, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """The factors that all layers slice, from the file or drawn as PEFT draws them."""
    if adapter.kind != "VERA":
        return {}
    rank = adapter.rank_at("")
    sizes = {"A": (rank, max(t.n for t in targets.values())), "B": (max(t.m for t in targets.values()), rank)}
    if not adapter.shared and adapter.config.get("save_projection") is False:
        generator = torch.Generator().manual_seed(int(adapter.config.get("projection_prng_key", 0)))
        bounds = {part: math.sqrt(6.0 / size[1]) for part, size in sizes.items()}
        return {
            part: torch.empty(size).uniform_(-bounds[part], bounds[part], generator=generator) for part, size in sizes.items()
        }
    for part, size in sizes.items():
        found = adapter.shared.get(part)
        if found is None or tuple(found.shape) != size:
            have = "missing" if found is None else f"{tuple(found.shape)}"
            raise CheckpointError(f"{adapter.folder}: vera_{part} is {have} in the file; the layers of this model need {size}")
    return dict(adapter.shared)


def _rank(parts: Mapping[str, Tensor]) -> int:
    return parts["A"].shape[0] if "A" in parts else parts["d"].numel()


def _recipe(adapter: PeftAdapter, ranks: Mapping[str, int]) -> Recipe:
    """The catalog's recipe with the file's rank, alpha and dropout."""
    config, rank = adapter.config, Counter(ranks.values()).most_common(1)[0][0]
    if adapter.kind == "VERA":
        dropout = float(config.get("vera_dropout", 0.0))
        return catalog.vera(rank=rank, d_initial=float(config.get("d_initial", 0.1)), dropout=dropout, save_projections=True)
    dropout = float(config.get("lora_dropout", 0.0))
    alpha = float(at_pattern(None, "", config.get("lora_alpha", 8)))
    policy = "rslora" if config.get("use_rslora") else "lora"
    if adapter.magnitudes:
        recipe = catalog.dora(rank=rank, alpha=alpha, dropout=dropout, scale=policy)
    elif policy == "rslora":
        recipe = catalog.rslora(rank=rank, alpha=alpha, dropout=dropout)
    else:
        recipe = catalog.lora(rank=rank, alpha=alpha, dropout=dropout)
    other = {site: value for site, value in ranks.items() if value != rank}
    return Recipe(**{**recipe.__dict__, "ranks": other})


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
def _fill(handle: Handle, parts: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor]) -> None:
    bank = handle.bank
    if shared and bank is not None:
        for part, tensor in shared.items():
            bank[part].copy_(tensor)
    for site, tensors in parts.items():
        entry = handle.parameterization(site)
        roles = entry.roles()
        if "A" in tensors:
            device, dtype = roles["B"].device, roles["B"].dtype
            B = tensors["B"].to(device, torch.promote_types(dtype, torch.float32)) / cast(float, entry.scale)
            entry.load_factors(LowRank(B.to(dtype), tensors["A"].to(device, dtype)))
        for role in set(tensors) - {"A", "B"}:
            roles[role].copy_(tensors[role])
