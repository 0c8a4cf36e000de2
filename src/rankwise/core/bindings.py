"""Putting parameterizations into a model, three ways that must agree.

path         (default) the layer's class becomes a generated subclass that keeps `weight`, `bias`, type and keys, and
calls the operator's fast path; the adapters are the child `<layer>.adapter`
weight       torch's parametrize with `dense()`: for weights that are read without calling the layer
functional   `effective_weights(model)`: name -> adapted weight, for torch.func, certificates and tests
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.core import routing  # noqa: F401  (registers the passes for one adapter per row)
from rankwise.core.combinators import Routed, Scaled, Sum
from rankwise.core.errors import ActivationError, TargetError, TrainingError
from rankwise.core.layouts import Layout
from rankwise.core.operators import Base, Dense, Operator
from rankwise.core.parameterization import Additive, Parameterization
from rankwise.core.randomness import inside_backward, may_be_recomputed
from rankwise.core.reparameterized import ReparameterizedBias, ReparameterizedWeight
from rankwise.core.targets import Target, dequantize, is_quantized, weight_parameter

Selection = tuple[tuple[str, float], ...]
TAKEN_NAMES = frozenset(
    {"layout", "shape", "active", "rows", "stash", "stash_bias", "merged", "checkpointed"}
)  # fields of `Adapters`


class Adapters(nn.ModuleDict):
    """The child `<layer>.adapter`: the named parameterizations of one layer, and which of them act.

    Attributes:
        target: the layer and its layout.
        active: (name, weight) of those that act; empty for the frozen layer alone.
        rows: for a batch with an adapter per row, (names, index of each row's name); a name "" is the frozen layer.
        stash: the untouched weight, while something is merged or absorbed into it.
        stash_bias: the untouched bias, while a method that changes the bias is merged.
        merged: names merged into the weight.
        checkpointed: selections used in forwards that may run again, since the last optimizer step.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.layout, self.shape = target.layout, (target.m, target.n)
        self.active: Selection = ()
        self.rows: tuple[tuple[str, ...], Tensor] | None = None
        self.stash: Tensor | None = None
        self.stash_bias: Tensor | None = None
        self.merged: tuple[str, ...] = ()
        self.checkpointed: dict[tuple[Selection, int], None] = {}

    def base(self, layer: nn.Module) -> Base:
        """The layer as it stands now, merged and absorbed parts included."""
        original = _original_class(layer).forward
        return Base(
            layer, self.layout, functools.partial(original, layer), functools.partial(_matrix, layer, self.layout), self.shape
        )

    def untouched(self, layer: nn.Module) -> Operator:
        """The layer as it was before anything was merged or absorbed."""
        return self.base(layer) if self.stash is None else Dense(self.layout.to_matrix(self.stash))

    def __getitem__(self, name: str) -> Parameterization:
        return cast(Parameterization, super().__getitem__(name))

    def operator(self, layer: nn.Module) -> Operator:
        """The operator that acts now."""
        if self.rows is not None:
            names, rows = self.rows
            chosen: list[Selection] = [((name, 1.0),) if name in self else () for name in names]
            biases = [self.bias(layer, selection) for selection in chosen]
            return Routed([self._acting(layer, selection) for selection in chosen], rows, biases)
        return self._acting(layer, self.active)

    def _acting(self, layer: nn.Module, selection: Selection) -> Operator:
        """One adapter alone where it may act by itself, else the combination."""
        alone = not self.merged and len(selection) == 1 and selection[0][1] == 1.0
        if alone and self._absorbed() <= {selection[0][0]}:
            return self[selection[0][0]].effective(self.base(layer))
        return self.combined(layer, selection)

    def combined(self, layer: nn.Module, selection: Selection) -> Operator:
        """W₀ + Σ weight · (W' - W₀) + what is merged; exact for every method.

        Starts from the layer as it stands, which holds all absorbed and merged parts, so only the rest is added.
        """
        weights = {name: weight for name, weight in selection if name not in self.merged}
        terms: list[Operator] = [self.base(layer)]
        for name, weight in weights.items():
            terms.extend(self._change(layer, name, weight))
        for name in sorted(self._absorbed() - set(self.merged)):
            factor = weights.get(name, 0.0) if isinstance(self[name], Additive) else 0.0
            moved = self[name].moved(self.untouched(layer)) if factor != 1.0 else None
            if moved is not None:
                terms.append(Scaled(moved, factor - 1.0))
        return terms[0] if len(terms) == 1 else Sum(*terms)

    def bias(self, layer: nn.Module, selection: Selection) -> Tensor | None:
        """The layer's bias (m,) b₀ + Σ weight · (b' - b₀) + what is merged, or None where it has none."""
        bias: Tensor | None = getattr(layer, "bias", None)
        changing = [(self[name], weight) for name, weight in selection if name not in self.merged and self[name].changes_bias]
        if bias is None or not changing:
            return bias
        untouched = bias if self.stash_bias is None else self.stash_bias
        if len(changing) == 1 and changing[0][1] == 1.0 and self.stash_bias is None:
            return changing[0][0].adapted_bias(bias)
        return bias + sum(weight * (entry.adapted_bias(untouched) - untouched) for entry, weight in changing)

    def _change(self, layer: nn.Module, name: str, weight: float) -> list[Operator]:
        """The terms of weight · (W' - W₀), without the absorbed part of an additive method."""
        entry, carried = self[name], self[name].carried()
        if isinstance(entry, Additive):
            parts: list[Operator] = [entry.update()]
            if carried is not None and not entry.absorbed:
                parts.append(carried)
            return [part if weight == 1.0 else Scaled(part, weight) for part in parts]
        untouched = self.untouched(layer)
        moved = entry.moved(untouched) if entry.absorbed else None
        own = untouched if moved is None else Sum(untouched, moved)
        return [Scaled(entry.effective(own), weight), Scaled(untouched, -weight)]

    def _absorbed(self) -> set[str]:
        return {name for name in self if self[name].absorbed}

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer's forward with what is active."""
        if self.training and not torch.compiler.is_compiling():
            self._repeat_or_remember()
        idle = all(name in self.merged for name, _ in self.active) and not self._absorbed() - set(self.merged)
        if self.rows is None and idle:
            return _original_class(layer).forward(layer, x)
        y = self.operator(layer).affine(x, self.layout, self.bias(layer, self.active))
        return y if x.is_floating_point() else self.layout.finish(y, x, weight_parameter(layer).dtype)

    def _repeat_or_remember(self) -> None:
        """Under gradient checkpointing, a layer that runs again in backward must use what was active in its forward."""
        if not inside_backward():
            if may_be_recomputed():
                self.checkpointed[self.active, id(self.rows)] = None
            return
        if self.checkpointed and self.checkpointed != {(self.active, id(self.rows)): None}:
            raise TrainingError(
                "another adapter was chosen between a checkpointed forward and its backward, so the layers that run again "
                "would use the wrong one; call backward() (and handle.after_step()) before activating another adapter"
            )

    def extra_repr(self) -> str:
        said = ", ".join(name if weight == 1.0 else f"{weight:g}·{name}" for name, weight in self.active) or "none"
        return f"active: {said}" + (f", merged: {', '.join(self.merged)}" if self.merged else "")


def _matrix(layer: nn.Module, layout: Layout) -> Tensor:
    return layout.to_matrix(dequantize(layer))


@functools.cache
def adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a layer class that runs its adapters."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return cast(Adapters, self._modules["adapter"]).run(self, x)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (original,), self.__getstate__()

    members = {"forward": forward, "__reduce_ex__": reduce, "_rankwise_original": original, "__module__": original.__module__}
    return type(original.__name__, (original,), members)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    generated = adapted_class(original)
    return generated.__new__(generated)


def _original_class(layer: nn.Module) -> Any:
    return getattr(type(layer), "_rankwise_original", type(layer))


def attach(target: Target, name: str, entry: Parameterization, *, binding: str) -> Adapters:
    """Adds a parameterization to a layer under an adapter name."""
    layer = target.module
    adapters = layer._modules.get("adapter")
    if not isinstance(adapters, Adapters):
        adapters = Adapters(target)
        layer.add_module("adapter", adapters)
        if binding == "path":
            layer.__class__ = adapted_class(type(layer))
        else:
            parametrize.register_parametrization(layer, "weight", ReparameterizedWeight(adapters, target), unsafe=True)
    needed = entry.changes_bias and getattr(layer, "bias", None) is not None  # an earlier adapter may have left it alone
    if needed and parametrize.is_parametrized(layer, "weight") and not parametrize.is_parametrized(layer, "bias"):
        parametrize.register_parametrization(layer, "bias", ReparameterizedBias(adapters), unsafe=True)
    adapters[name] = entry
    return adapters


def detach(target: Target, name: str) -> None:
    """Takes a parameterization away; with the last one the layer gets its own class back."""
    layer = target.module
    adapters = cast(Adapters, layer._modules["adapter"])
    del adapters[name]
    if len(adapters):
        return
    if parametrize.is_parametrized(layer, "weight"):
        for tensor in [*cast(Any, layer).parametrizations]:
            parametrize.remove_parametrizations(layer, tensor, leave_parametrized=False)
    else:
        layer.__class__ = _original_class(layer)
    del layer._modules["adapter"]
    layer.__dict__.pop("_rankwise_square_row_norms", None)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """(name, layer, adapters) of every adapted layer."""
    for name, module in model.named_modules():
        adapters = module._modules.get("adapter")
        if isinstance(adapters, Adapters):
            yield name, module, adapters


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """The `functional` binding: "<layer>.weight" -> adapted weight (bias too where it changes), differentiable.

    Use them with `functional_call`, which runs the model with its adapters switched off.

    Raises:
        TargetError: a layer is quantized.
    """
    weights = {}
    for name, layer, adapters in adapted_layers(model):
        if is_quantized(layer):
            raise TargetError(f"{name} is quantized, so its weight cannot be exchanged; load the model dequantized")
        weight = cast(Tensor, layer.weight)
        matrix = adapters.operator(layer).dense().to(weight.dtype)
        weights[f"{name}.weight"] = adapters.layout.from_matrix(matrix, weight)
        bias = adapters.bias(layer, adapters.active)
        if bias is not None and bias is not layer.bias:
            weights[f"{name}.bias"] = bias
    return weights


def functional_call(model: nn.Module, weights: dict[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
    """Runs the model as a function of the given weights, adapters switched off."""
    with switched_off(model):
        return torch.func.functional_call(model, weights, arguments, keywords)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The frozen base alone, for the length of a with-block; merged parts stay merged."""
    kept: list[tuple[Adapters, Selection, Any]] = []
    for _, _, adapters in adapted_layers(model):
        kept.append((adapters, adapters.active, adapters.rows))
        adapters.active, adapters.rows = (), None
    try:
        yield
    finally:
        for adapters, active, rows in kept:
            adapters.active, adapters.rows = active, rows


def activate_(model: nn.Module, selection: str | dict[str, float] | list[str | None] | None) -> None:
    """Chooses which adapters act on a model.

    Args:
        model: an adapted model.
        selection: one name; {name: weight} for an exact weighted combination; a list with one name per row of the next batches
            (None: the frozen base for that row); or None for the frozen base.

    Raises:
        ActivationError: a name is not on the model.
    """
    layers = list(adapted_layers(model))
    known = {name for _, _, adapters in layers for name in adapters}
    rows = None
    chosen: Selection = ()
    if isinstance(selection, list):
        names = tuple(dict.fromkeys(name or "" for name in selection))
        wanted = set(names) - {""}
        rows = (names, torch.tensor([names.index(name or "") for name in selection]))
    else:
        weights = {} if selection is None else {selection: 1.0} if isinstance(selection, str) else selection
        wanted, chosen = set(weights), tuple((name, float(weight)) for name, weight in weights.items())
    missing = sorted(wanted - known)
    if missing:
        raise ActivationError(f"no adapter {', '.join(map(repr, missing))} on this model; there are: {sorted(known) or 'none'}")
    for _, layer, adapters in layers:
        adapters.active = tuple((name, weight) for name, weight in chosen if name in adapters)
        adapters.rows = None if rows is None else (rows[0], rows[1].to(cast(Tensor, layer.weight).device))
