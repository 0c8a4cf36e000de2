"""`to_peft`: an adapter as a folder that peft, and through its format vLLM and llama.cpp, load.

The safest form is plain LORA: the scale folded into B and alpha = r, one common rank by zero padding, the layers named one by
one, no patterns, no biases, the fewest fields. Consumers read the rest differently or not at all (a scale α/√r, a pattern).
Whatever is exactly of low rank goes out this way, VeRA and PiSSA's rank 2r included. `native=True` keeps the method's own
type instead. What is not of low rank is refused with its numerical rank and what the best substitute would lose.

The update is built again from the tensors of the written file and compared with the adapter's before the file gets its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rankwise.core.errors import ExportError, shorten
from rankwise.core.handle import Handle
from rankwise.core.layouts import ConvLayout, LinearLayout
from rankwise.core.operators import LowRank
from rankwise.core.queries import svd
from rankwise.interop.peft_files import FINGERPRINT, PREFIX, PeftAdapter, pad, put_factors, write
from rankwise.interop.peft_method import convolution_trouble
from rankwise.interop.peft_native import native_form

EXACT = 1e-5  # relative error allowed for rounding to float32 and back


@dataclass
class Export:
    """What will be written: tensors by key, fields of the config, and the update (or weight) each layer must give back."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)  # site -> relative error


def to_peft(
    handle: Handle,
    directory: str | Path,
    *,
    tolerance: float | None = None,
    rank: int | None = None,
    native: bool = False,
) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        handle: the adapter.
        directory: made if need be; an older adapter in it is replaced when the new one is whole and verified.
        tolerance: relative Frobenius error ‖Δ - BA‖ / ‖Δ‖ that a layer may lose, where the update is not of low rank (or of a
            higher rank than `rank`). Without it nothing may be lost.
        rank: the common rank to write. Default: the smallest that fits.
        native: write DoRA, VeRA and rsLoRA in their own form, for going on training in peft.

    Raises:
        ExportError: the update cannot be written within the tolerance, or PEFT cannot hold it.
        CheckpointError: the folder cannot be written.
    """
    if rank is not None and rank < 1:
        raise ExportError(f"rank is at least 1, not {rank}")
    for site, target in handle.targets.items():
        trouble = convolution_trouble(target.layout) if isinstance(target.layout, ConvLayout) else None
        if trouble:
            raise ExportError(f"{site} is a convolution with {trouble}; merge_() and save the model instead")
    with torch.no_grad():
        if native:
            if rank is not None or tolerance is not None:
                raise ExportError("native=True writes the method as it is; rank= and tolerance= belong to the plain form")
            export, compare = _native(handle)
        else:
            export, compare = _plain(handle, tolerance, rank)
        _add_whole(handle, export)
        config = {**_common_fields(handle), **export.fields}
        metadata = {FINGERPRINT: json.dumps(dict(handle.fingerprint()))}
        tensors = {key: _ready(tensor) for key, tensor in export.tensors.items()}

        def check(adapter: PeftAdapter) -> None:
            for site in handle.targets:
                _verify(site, compare(adapter, site), export.allowed[site])
            lost = set(handle.auxiliary) - set(adapter.whole)
            if set(adapter.sites) != set(handle.targets) or lost:
                raise TypeError("the written PEFT adapter lacks layers; this is a bug in rankwise")

        return write(Path(directory), config, tensors, metadata, check)


Compare = Callable[[PeftAdapter, str], tuple[Tensor, Tensor]]  # (what the file gives, what the adapter gives)


def _plain(handle: Handle, tolerance: float | None, rank: int | None) -> tuple[Export, Compare]:
    """LORA, scale folded in, one common rank."""
    pairs, losses = {}, {}
    refused: list[str] = []
    for site, target in handle.targets.items():
        exact = handle.low_rank_of(site)
        limit = min(target.m, target.n) if rank is None else rank
        if exact is not None and exact.rank <= limit:
            pairs[site], losses[site] = exact, 0.0
            continue
        pair, loss, reason = _substitute(handle, site, exact, tolerance, rank)
        pairs[site], losses[site] = pair, loss
        if reason is not None:
            refused.append(f"{site}: {reason}")
    if refused:
        ways = "pass tolerance= to accept a substitute, or merge_() the adapter and save the model"
        forms = " (native=True writes it in PEFT's own form)" if handle.recipe.parameterization.name == "Magnitude" else ""
        raise ExportError(
            f"{handle.recipe.name!r} cannot be written as LoRA exactly at {len(refused)} of {len(handle.targets)} layers\n  "
            + "\n  ".join(refused[:8] + ([f"and {len(refused) - 8} more"] if len(refused) > 8 else []))
            + f"\n{ways}{forms}"
        )
    common = max([pair.rank for pair in pairs.values()] + [rank or 1])
    export = Export({"peft_type": "LORA", "r": common, "lora_alpha": common, "lora_dropout": 0.0})
    for site, pair in pairs.items():
        put_factors(export.tensors, handle.targets[site], pad(pair, common))
        export.allowed[site] = losses[site] + EXACT

    def compare(adapter: PeftAdapter, site: str) -> tuple[Tensor, Tensor]:
        return _wide(adapter.factors(site).dense()), _wide(handle.update_of(site).dense())

    return export, compare


def _substitute(
    handle: Handle, site: str, exact: LowRank | None, tolerance: float | None, rank: int | None
) -> tuple[LowRank, float, str | None]:
    """The best factors within the tolerance or at the rank, what they lose, and why they are refused (or None)."""
    operator = handle.update_of(site) if exact is None else LowRank(_wide(exact.B), _wide(exact.A))
    matrix = svd(operator)
    U, S, Vh = (_wide(part) for part in matrix)
    total = float(S.norm())
    epsilon = torch.finfo(matrix.S.dtype).eps
    numerical = int((S[0] * max(handle.targets[site].m, handle.targets[site].n) * epsilon < S).sum())
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt() / (total or 1.0)  # tails[k] = error of the best rank k
    errors = [*tails.tolist(), 0.0]
    lossless = exact is not None  # its inner width exceeds the layer or the rank asked for, but the product may not
    if rank is not None:
        chosen = min(rank, S.numel())
    elif lossless:
        chosen = max(1, numerical)
    else:
        asked = handle.parameterization(site).rank or 8
        chosen = next(k for k in range(1, S.numel() + 1) if errors[k] <= tolerance) if tolerance is not None else asked
        chosen = min(chosen, S.numel())
    loss = errors[chosen]
    pair = LowRank(U[:, :chosen] * S[:chosen], Vh[:chosen])  # (m, r), (r, n)
    bound = EXACT if tolerance is None and lossless else tolerance
    if bound is not None and loss <= bound:
        return pair, loss, None
    limit = "" if tolerance is None else f", above the tolerance {tolerance:.3g}"
    return pair, loss, f"numerical rank {numerical}; the best rank-{chosen} substitute has relative error {loss:.3g}{limit}"


def _native(handle: Handle) -> tuple[Export, Compare]:
    """The method's own type, see `peft_native`."""
    fields, tensors, rebuild = native_form(handle)
    export = Export(fields, tensors, dict.fromkeys(handle.targets, EXACT))

    def compare(adapter: PeftAdapter, site: str) -> tuple[Tensor, Tensor]:
        # A rescaled weight is compared as a weight: its update is a small difference of large numbers.
        base = _wide(handle.adapters(site).untouched(handle.targets[site].module).dense())
        ours = base + _wide(handle.update_of(site).dense())
        return rebuild(adapter, site, base), ours

    return export, compare


def _verify(site: str, pair: tuple[Tensor, Tensor], allowed: float) -> None:
    written, meant = pair
    if not torch.isfinite(written).all() or not torch.isfinite(meant).all():
        raise ExportError(f"{site}: the update holds NaN or infinity; nothing was written. Load an earlier checkpoint")
    error, size = float((written - meant).norm()), float(meant.norm())
    if error > allowed * size:
        raise ExportError(
            f"{site}: the update read back from the file is off by {error / (size or 1.0):.3g} of its norm, "
            f"where {allowed:.3g} is allowed; nothing was written"
        )


def _common_fields(handle: Handle) -> dict[str, Any]:
    """Fields of every type."""
    config = getattr(handle.model, "config", None)
    transposed = [isinstance(t.layout, LinearLayout) and t.layout.transposed for t in handle.targets.values()]
    return {
        "auto_mapping": None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": all(transposed),
        "inference_mode": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in handle.auxiliary}) or None,
        "target_modules": _target_modules(handle),
        "task_type": None,
    }


def _target_modules(handle: Handle) -> list[str] | str:
    """The layers by full name; as an expression where a name would match other layers too, since lists match by their end."""
    names = sorted(handle.targets)
    others = [name for name, _ in handle.model.named_modules() if name and name not in handle.targets]
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "(?:" + "|".join(re.escape(name) for name in names) + ")"
    return names


def _add_whole(handle: Handle, export: Export) -> None:
    """Tensors trained whole beside the adapter, as modules_to_save."""
    named = dict(handle.model.named_parameters())
    owners = {name.rpartition(".")[0] for name in handle.auxiliary}
    modules = [name for name, _ in handle.model.named_modules()]
    for owner in owners:
        clashes = [name for name in modules if name != owner and name.endswith(owner)]
        if clashes:
            raise ExportError(
                f"PEFT finds modules_to_save by the end of their name, and {owner} is also the end of {shorten(clashes)}"
            )
    inside = {f"{owner}.{key}" for owner in owners for key in dict(handle.model.get_submodule(owner).named_parameters())}
    if inside != set(handle.auxiliary):
        frozen = shorten(sorted(inside - set(handle.auxiliary)))
        raise ExportError(f"modules trained whole must be trained with all their parameters for PEFT; not trained: {frozen}")
    export.tensors.update({f"{PREFIX}{name}": named[name] for name in handle.auxiliary})


def _ready(tensor: Tensor) -> Tensor:
    """On the CPU, whole, contiguous, of its own storage, and no wider than float32."""
    gather = getattr(tensor, "full_tensor", None)
    plain = cast(Tensor, gather() if gather is not None else tensor).detach().cpu()
    return plain.to(torch.float32 if plain.dtype is torch.float64 else plain.dtype).contiguous().clone()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
