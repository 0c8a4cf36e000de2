"""Intrinsic dimension: all layers move together in one random subspace of d dimensions.

    W'_l = W_l + λ_l · (P v)_l          v (d,) trained, of all layers, starts at 0; P (D, d) frozen, columns of norm one

D = Σ m n over the adapted layers, in the order of the model; (P v)_l are the m·n numbers of layer l. P is drawn from a seed by
a private CPU generator: "fastfood", "dense" or "sparse" (see `intrinsic`); a checkpoint holds v, the seed and a hash.
`scope="model"` is the paper's: one P for all layers, its columns normalized over all of them. `scope="tensor"` gives every
layer a P of its own with columns of norm one, a common port, whose columns have norm √(#layers) over the model. λ_l is 1, or
trained with `gains` (SAID), one number per layer. Trained numbers d, of the whole model. P v is computed once per forward, O(L
log L) with L the power of two from D on, and each layer is one product with W + (P v)_l. A generic dense matrix, so it exports
as LoRA only by truncation. No dropout; weight decay on v acts on ‖P v‖. A weight tied to another is moved where it is adapted,
and counts once.

Not only an adapter: the smallest d that reaches 90 % of full training measures a task (`rankwise intrinsic-dimension`).

*Differs*: the paper moves biases too; SAID takes its gains out of the d numbers, here they come on top.

Li, Farkhoor, Liu, Yosinski: Measuring the Intrinsic Dimension of Objective Landscapes, 2018, arXiv:1804.08838. Aghajanyan,
Zettlemoyer, Gupta: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning, 2020, arXiv:2012.13255.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.bank import Bank
from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.operators import Dense, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.core.randomness import generator_for
from rankwise.parameterizations.intrinsic import PROJECTIONS, Projection
from rankwise.parameterizations.plan import can_plan


@register("parameterization")
class Subspace(Additive):
    """W' = W + gain · (P v) of this layer.

    Args:
        site: the layer.
        dimension: d.
        projection: "fastfood", "dense" or "sparse".
        scope: "model" for one P over all layers, "tensor" for one per layer.
        gains: train a factor per layer.
    """

    facts = Facts(exact_lora_export=False)
    bank: Bank

    def __init__(
        self, site: Site, *, dimension: int = 1000, projection: str = "fastfood", scope: str = "model", gains: bool = False
    ) -> None:
        super().__init__()
        assert site.bank is not None
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already
        self.kind, self.scope, self.once, self.m, self.n = projection, scope, site.once, site.m, site.n
        self.place = site.bank["layers"].tolist().index(_hash(site.name))
        offsets = site.bank["offsets"].tolist()
        self.counts = [site.m * site.n] if scope == "tensor" else [b - a for a, b in itertools.pairwise(offsets)]
        self.gain = nn.Parameter(site.zeros(1)[0] + 1) if gains else None  # ()

    @classmethod
    def roles_of(cls, **arguments: Any) -> frozenset[str]:
        return frozenset({"v", "gain"} if arguments.get("gains") else {"v"})

    @classmethod
    def problems_at(cls, site: Site, **arguments: Any) -> list[Problem]:
        dimension, kind = arguments.get("dimension", 1000), _kind(arguments.get("projection", "fastfood"))
        most = kind.largest(site.m * site.n)
        if dimension >= 1 and (arguments.get("scope", "model") != "tensor" or dimension <= most):
            return []
        needs, has = f"dimension from 1 to {most}", f"it is {dimension} for a layer of {site.m} × {site.n}"
        remedy = f"use dimension={most} or less, or scope='model'"
        return [Problem(piece="intrinsic_dimension", needs=needs, has=has, remedy=remedy, sites=(site.name,))]

    @classmethod
    def shared(cls, sites: Sequence[Site], **arguments: Any) -> Bank | None:
        dimension, scope = arguments.get("dimension", 1000), arguments.get("scope", "model")
        kind, first = _kind(arguments.get("projection", "fastfood")), sites[0]
        if scope not in ("model", "tensor"):
            raise ArgumentError(f"scope is model or tensor, not {scope!r}")
        counts = [site.m * site.n for site in sites]
        tensors: dict[str, Tensor] = {
            "v": nn.Parameter(first.zeros(dimension)),  # (d,)
            "layers": torch.tensor([_hash(site.name) for site in sites], device=first.device),  # (layers,) their order
            "offsets": torch.tensor([0, *itertools.accumulate(counts)], device=first.device),  # (layers + 1,)
        }
        for number, size in enumerate(counts if scope == "tensor" else [sum(counts)]):
            seed = generator_for(first.seed, "projection", number).initial_seed()
            for key, tensor in kind(size, dimension, seed).tensors.items():
                tensors[f"{key}_{number}"] = first.cast(tensor) if tensor.is_floating_point() else tensor.to(first.device)
        return Bank(tensors, seed=first.seed)

    def projected(self) -> tuple[Tensor, ...]:
        """P v, by layer: (m·n,) of each, or of this one alone."""
        v = self.bank["v"]
        number = self.place if self.scope == "tensor" else 0
        names = {key: key.rpartition("_") for key, _ in self.bank.named_buffers()}
        tensors = {name: self.bank[key] for key, (name, _, index) in names.items() if index == str(number)}
        projection = _kind(self.kind)(sum(self.counts), v.shape[0], tensors=tensors)
        with torch.autocast(v.device.type, enabled=False):
            return projection.cut(v.to(torch.promote_types(v.dtype, torch.float32)), self.counts)

    def update(self) -> Operator:
        v = self.bank["v"]
        shareable = self.scope == "model" and not torch.compiler.is_compiling() and can_plan([v])
        if shareable and self.once is not None:
            parts = self.once((v.data_ptr(), v._version, v.dtype, v.device), self.projected)
        else:
            parts = self.projected()
        change = parts[self.place if len(parts) > 1 else 0].view(self.m, self.n)
        return Dense(change if self.gain is None else change * self.gain)


def _kind(name: str) -> type[Projection]:
    if name not in PROJECTIONS:
        raise ArgumentError(f"projection is one of {', '.join(PROJECTIONS)}, not {name!r}")
    return PROJECTIONS[name]


def _hash(name: str) -> int:
    """A number for a layer's name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
