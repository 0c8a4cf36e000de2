"""The methods that PEFT has a form of its own for, written in that form: LoRA with its scale, DoRA, VeRA."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankwise.core.combinators import Sum
from rankwise.core.errors import ExportError
from rankwise.core.handle import Handle
from rankwise.core.layouts import LinearLayout
from rankwise.core.operators import LowRank
from rankwise.core.queries import as_low_rank
from rankwise.interop.peft_files import PREFIX, PeftAdapter, pad, put_factors

Rebuild = Callable[[PeftAdapter, str, Tensor], Tensor]  # (file, site, base weight (m, n)) -> adapted weight, in float64
Form = tuple[dict[str, Any], dict[str, Tensor], Rebuild]


def native_form(handle: Handle) -> Form:
    """Fields of the config, tensors, and how the file gives the adapted weight back.

    Raises:
        ExportError: PEFT has no such form.
    """
    forms = {"LoRA": _lora, "Magnitude": _dora, "SharedBank": _vera}
    method = handle.recipe.parameterization.name
    if method not in forms:
        raise ExportError(f"PEFT has no form of its own that is {method} as trained here; use native=False")
    return forms[method](handle)


def _refuse_carried(handle: Handle) -> None:
    entries = {site: handle.parameterization(site) for site in handle.targets}
    carrying = [site for site, entry in entries.items() if entry.carried() is not None or entry.replacement is not None]
    if carrying:
        raise ExportError(
            f"{handle.recipe.name!r} moved the base at {len(carrying)} layers (its start or a restart), which this form cannot "
            "state; native=False writes base correction and update as one LoRA"
        )


def _lora(handle: Handle) -> Form:
    """LORA with alpha as trained and use_rslora, layers of another rank or scale named in patterns."""
    _refuse_carried(handle)
    root = handle.recipe.parameterization.arguments.get("scale") == "rslora"
    entries = {site: handle.parameterization(site) for site in handle.targets}
    rank = Counter(entry.rank for entry in entries.values()).most_common(1)[0][0]
    alphas = {site: entry.scale * (math.sqrt(entry.rank) if root else entry.rank) for site, entry in entries.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole_number(alpha),
        "use_rslora": root,
        "lora_dropout": float(handle.recipe.parameterization.arguments.get("dropout", 0.0)),
        "rank_pattern": {_exactly(site): entry.rank for site, entry in entries.items() if entry.rank != rank},
        "alpha_pattern": {_exactly(site): _whole_number(value) for site, value in alphas.items() if value != alpha},
    }
    tensors: dict[str, Tensor] = {}
    for site, entry in entries.items():
        pair = as_low_rank(entry.update())
        if pair is None:
            raise TypeError(f"{type(entry).__name__} has no factors; this is a bug in rankwise")
        put_factors(tensors, handle.targets[site], LowRank(pair.B, pair.A))

    def rebuild(adapter: PeftAdapter, site: str, base: Tensor) -> Tensor:
        return base + adapter.factors(site).dense().double()

    return fields, tensors, rebuild


def _dora(handle: Handle) -> Form:
    """LORA with use_dora. What stands inside the norm, carried parts included, is one product of the common rank."""
    pairs: dict[str, LowRank] = {}
    for site in handle.targets:
        entry = handle.parameterization(site)
        carried = entry.carried()
        pair = as_low_rank(entry.update() if carried is None else Sum(entry.update(), carried))
        if pair is None or entry.replacement is not None:
            raise ExportError(f"{site}: what DoRA adds inside the norm is not of low rank here; merge_() and save the model")
        pairs[site] = pair.folded()
    common = max(1, *(pair.rank for pair in pairs.values()))
    fields = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "use_dora": True,
        "lora_dropout": float(handle.recipe.parameterization.arguments.get("dropout", 0.0)),
    }
    tensors: dict[str, Tensor] = {}
    for site, pair in pairs.items():
        target = handle.targets[site]
        if pair.rank == 0:  # magnitudes alone
            pair = LowRank(pair.B, pair.A.new_zeros(0, target.n))
        put_factors(tensors, target, pad(pair, common))
        magnitude = handle.parameterization(site).roles()["magnitude"]
        axes = target.parameter().dim() - 2 if target.layout.kind == "conv" else 0
        shape = (1, -1, *(1 for _ in range(axes))) if axes else (-1,)
        tensors[f"{PREFIX}{site}.lora_magnitude_vector"] = magnitude.reshape(shape)

    def rebuild(adapter: PeftAdapter, site: str, base: Tensor) -> Tensor:
        direction = base + adapter.factors(site).dense().double()  # (m, n)
        norms = direction.norm(dim=1)
        magnitude = adapter.sites[site]["magnitude"].double().reshape(-1)  # (m,)
        return torch.where(norms > 0, magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)[:, None] * direction

    return fields, tensors, rebuild


def _vera(handle: Handle) -> Form:
    """VERA, the shared factors with it."""
    _refuse_carried(handle)
    others = [site for site, target in handle.targets.items() if not isinstance(target.layout, LinearLayout)]
    if others:
        raise ExportError(f"PEFT's VeRA knows linear layers only, {others[0]} is none; native=False writes it as LoRA")
    bank = handle.bank
    if bank is None:
        raise ExportError("PEFT's VeRA shares its factors between all layers; with share=False write it as LoRA (native=False)")
    arguments = handle.recipe.parameterization.arguments
    fields = {
        "peft_type": "VERA",
        "r": bank["A"].shape[0],
        "d_initial": float(arguments.get("d_initial", 0.1)),
        "vera_dropout": float(arguments.get("dropout", 0.0)),
        "save_projection": True,
        "projection_prng_key": 0,
    }
    tensors = {"base_model.vera_A": bank["A"], "base_model.vera_B": bank["B"]}
    for site in handle.targets:
        vectors = handle.parameterization(site).state_dict()  # with train="b" or "d" the other one is a buffer
        tensors[f"{PREFIX}{site}.vera_lambda_b"] = vectors["b"]
        tensors[f"{PREFIX}{site}.vera_lambda_d"] = vectors["d"]

    def rebuild(adapter: PeftAdapter, site: str, base: Tensor) -> Tensor:
        parts, (m, n) = adapter.sites[site], base.shape
        left = parts["b"].double()[:, None] * adapter.shared["B"].double()[:m]  # (m, r)
        return base + (left * parts["d"].double()) @ adapter.shared["A"].double()[:, :n]

    return fields, tensors, rebuild


def _exactly(site: str) -> str:
    """A layer's name as a pattern that fits this layer."""
    return "^" + site.replace(".", r"\.")


def _whole_number(value: float) -> int | float:
    """As an integer where it is one; PEFT declares alpha as such."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
