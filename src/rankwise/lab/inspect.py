"""`rankwise inspect`: what an adapter does to each layer, in numbers and as a heat map.

Per layer, with D the update (m, n), σ its singular values, W the frozen weight:

    norm             ‖D‖_F, and ‖D‖_F / ‖W‖_F with the base
    effective rank   exp(-Σ p log p), p = σ / Σσ: how many directions share the update
    stable rank      ‖D‖_F² / σ₁²
    lost at r'       Σ_{k > r'} σ_k² / Σ σ_k²: the share of the energy that cutting to rank r' loses
    imbalance        ‖Bᵀ B - A Aᵀ‖_F / (‖Bᵀ B‖_F + ‖A Aᵀ‖_F): 0 where both factors carry the same, 1 where one carries all
    intruders        leading singular vectors of W + D that are in none of W's (needs the base)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rankwise.certificates.intruder_vectors import intruders
from rankwise.certificates.theory_spectra import ranks
from rankwise.core.operators import Operator
from rankwise.core.queries import as_low_rank, svd
from rankwise.core.queries import rank_bound as bound_of
from rankwise.lab.open import base_of, check_adapter, factors_of, put_on, updates_of
from rankwise.lab.runs import adapter_folder

CUTS = (1, 2, 4, 8, 16, 32, 64, 128)
LOOKED_AT = 10  # leading singular vectors that are looked at for intruders


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the adapter does to one layer; `relative_norm` and `intruders` are None without the base."""

    site: str
    m: int
    n: int
    rank: int
    norm: float
    effective_rank: float
    stable_rank: float
    lost: Mapping[int, float]
    relative_norm: float | None = None
    imbalance: float | None = None
    intruders: int | None = None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All layers of an adapter."""

    adapter: str
    base: str | None
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def cuts(self) -> tuple[int, ...]:
        """The ranks r' below the largest rank."""
        return tuple(cut for cut in CUTS if any(cut < layer.rank for layer in self.layers))

    def lost(self, cut: int) -> float:
        """The share of the whole adapter's energy that cutting every layer to this rank loses."""
        total = sum(layer.norm**2 for layer in self.layers)
        return sum(layer.norm**2 * layer.lost.get(cut, 0.0) for layer in self.layers) / total if total else 0.0

    def place(self, site: str) -> tuple[str, str]:
        """Where a layer stands in the heat map: the number of its block, and what it is inside the block."""
        match = re.search(r"\.(\d+)\.", f".{site}.")
        if match is None:
            return "", site
        before, after = f".{site}."[: match.start()].strip("."), f".{site}."[match.end() :].strip(".")
        stacks = {re.split(r"\.\d+\.", layer.site)[0] for layer in self.layers if re.search(r"\.\d+\.", layer.site)}
        return match.group(1), after if len(stacks) < 2 else f"{before}.{after}"


def inspect_adapter(adapter: str | Path, base: str | None = None, *, task: str | None = None) -> Inspection:
    """Measures an adapter of rankwise or PEFT.

    Args:
        adapter: its folder.
        base: the model it belongs to, for relative norms and intruders; needed where the update depends on it (DoRA, …).
        task: kind of the base, where the adapter does not say.

    Raises:
        CheckpointError: no adapter, a damaged one, or one that cannot be read without its base.
    """
    folder = adapter_folder(Path(adapter))
    check_adapter(folder)
    if base is None:
        updates, factors = updates_of(folder)
        note = "intruder dimensions and norms relative to the weights need the model: pass --base"
        layers = [_layer(site, update, factors.get(site), None) for site, update in sorted(updates.items(), key=_natural)]
        return Inspection(adapter=str(adapter), base=None, layers=tuple(layers), notes=(note,))
    model, origin = base_of([folder], base, task)
    handle = put_on(model, folder)
    factors = factors_of(handle)
    layers = [
        _layer(site, update, factors.get(site), handle.adapters(site).untouched(handle.targets[site].module).dense())
        for site, update in handle.updates().items()
    ]
    whole = tuple(f"trained whole beside the adapter: {name} {tuple(p.shape)}" for name, p in handle.auxiliary.items())
    return Inspection(adapter=str(adapter), base=origin.model, layers=tuple(layers), notes=whole)


def _natural(item: tuple[str, Operator]) -> list[tuple[int, int, str]]:
    """Files keep sites in the order of the alphabet; this puts block 2 before block 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in item[0].split(".")]


@torch.no_grad()
def _layer(site: str, update: Operator, factors: tuple[Tensor, Tensor] | None, weight: Tensor | None) -> Layer:
    exact = as_low_rank(update) is not None
    values = (svd(update).S if exact else torch.linalg.svdvals(update.dense().float())).double()  # (k,)
    measured = ranks(values, tolerance=max(update.shape) * torch.finfo(torch.float32).eps)
    energy, total = values.square(), float(values.square().sum())
    rank = bound_of(update) if exact else int(measured["hard"])
    lost = {cut: float(energy[cut:].sum()) / total if total else 0.0 for cut in CUTS if cut < rank}
    norm = total**0.5
    imbalance = None
    if factors is not None:
        left, right = (part.double() @ part.double().t() for part in (factors[0].t(), factors[1]))  # (r, r) each
        size = float(left.norm() + right.norm())
        imbalance = float((left - right).norm()) / size if size else 0.0
    found: int | None = None
    relative: float | None = None
    if weight is not None:
        found = int(intruders(weight.float(), update, k=min(LOOKED_AT, *update.shape)).flags.sum())
        relative = norm / float(weight.double().norm())
    return Layer(
        site=site, m=update.shape[0], n=update.shape[1], rank=rank, norm=norm, effective_rank=measured["effective"],
        stable_rank=measured["stable"], lost=lost, relative_norm=relative, imbalance=imbalance, intruders=found,
    )  # fmt: skip
