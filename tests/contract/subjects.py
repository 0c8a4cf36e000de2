"""What the contract runs on: every parameterization of the catalog, and every kind of layer, in tiny float64 sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.recipe import Recipe


class Conv1D(nn.Module):
    """The layer of GPT-2 in transformers, with its weight as (n, m)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: how to make one, an input for it, and where= to adapt it."""

    name: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]


def _rows(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator, dtype=torch.float64)


LAYERS = (
    LayerKind("Linear", "linear", lambda: nn.Linear(8, 12), _rows(3, 5, 8)),
    LayerKind("Linear without bias", "linear", lambda: nn.Linear(12, 8, bias=False), _rows(7, 12)),
    LayerKind("Conv1D", "linear", lambda: Conv1D(12, 8), _rows(3, 5, 8)),
    LayerKind("Conv1d", "conv", lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2), _rows(2, 4, 11)),
    LayerKind("Conv2d", "conv", lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2), _rows(2, 4, 9, 7)),
    LayerKind("Conv2d grouped", "conv", lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False), _rows(2, 8, 5, 4)),
    LayerKind("Conv2d reflect", "conv", lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), _rows(2, 4, 5, 4)),
    LayerKind("Conv3d", "conv", lambda: nn.Conv3d(4, 8, 3, padding="same"), _rows(2, 4, 3, 4, 3)),
    LayerKind(
        "Embedding",
        "embedding",
        lambda: nn.Embedding(12, 8, padding_idx=1),
        lambda generator: torch.randint(0, 12, (3, 5), generator=generator),
    ),
)
LINEAR = LAYERS[0]


def first_kind(subject: Subject) -> LayerKind:
    """The kind of layer for checks that need one only: a linear one where the subject takes it."""
    return next(kind for kind in LAYERS if fits(subject, kind))


class One(nn.Module):
    """A model with one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def model_of(kind: LayerKind, seed: int = 0) -> nn.Module:
    """A fresh one-layer model in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return One(kind.make()).double()


def inputs_of(kind: LayerKind, seed: int = 1) -> Tensor:
    """An input for it."""
    return kind.inputs(torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Subject:
    """A parameterization under test."""

    name: str
    recipe: Recipe

    @property
    def facts(self):
        piece = self.recipe.parameterization
        return piece.factory.facts_of(**piece.arguments)


def subjects() -> list[Subject]:
    """Every parameterization of the catalog and its variants, in tiny sizes; procedures that bring one of their own too."""
    found = []
    for slug in [*rankwise.catalog.names("parameterization"), *rankwise.catalog.names("procedure")]:
        kept = rankwise.catalog.entry(slug)
        if kept.shelf == "procedure" and "parameterization" not in kept.make(**kept.tiny).own:
            continue
        recipe = kept.make(**kept.tiny)
        found.append(Subject(slug, Recipe(**{**recipe.__dict__, "procedure": None})))  # procedures have a contract of their own
        if kept.shelf == "parameterization":
            found += [Subject(text.replace("'", ""), rankwise.compose(text)) for text in kept.variants]
    return found


def statistics_of(model: nn.Module, subject: Subject, x: Tensor) -> dict | None:
    """What the subject's recipe needs to know of the data, from one batch."""
    if not subject.recipe.needs:
        return None

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0]).square().sum()

    return rankwise.collect(model, [(x,)], subject.recipe.needs, where=["layer"], loss=loss)


def fits(subject: Subject, kind: LayerKind) -> bool:
    """Whether the subject says it works on this kind of layer."""
    return kind.kind in subject.facts.layouts and not rankwise.problems(model_of(kind), subject.recipe, where=["layer"])


def scatter(handle: rankwise.Handle, seed: int = 2) -> None:
    """Moves every trained tensor to a generic point."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(noise.to(tensor.dtype) * 0.3)
