"""Which layers to adapt: "all-linear", names, or a predicate; and what was left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankwise.core.errors import TargetError, did_you_mean, shorten
from rankwise.core.layouts import ConvLayout, Layout, layout_of

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]

_GROUPS = {
    "all-linear": frozenset({"linear"}),
    "all-conv": frozenset({"conv"}),
    "all-layers": frozenset({"linear", "conv"}),
}


@dataclass(frozen=True)
class Target:
    """One layer of the model that can be adapted."""

    name: str
    module: nn.Module
    layout: Layout
    m: int
    n: int

    def parameter(self) -> nn.Parameter:
        """The weight itself."""
        return weight_parameter(self.module)

    def matrix(self) -> Tensor:
        """The frozen weight as (m, n), detached, in at least float32."""
        stash = getattr(self.module._modules.get("adapter"), "stash", None)  # untouched, while something is merged
        weight = self.layout.to_matrix(dequantize(self.module) if stash is None else stash).detach()
        return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight

    def mode_shape(self) -> tuple[int, ...]:
        """(out, in, kernel…)."""
        if isinstance(self.layout, ConvLayout):
            return (self.m, self.layout.channels, *self.layout.kernel)
        return (self.m, self.n)


def weight_parameter(layer: nn.Module) -> nn.Parameter:
    """The frozen weight tensor itself, also where torch's parametrize computes `layer.weight` from it."""
    if parametrize.is_parametrized(layer, "weight"):
        return cast(Any, layer).parametrizations.weight.original
    return cast(nn.Parameter, layer.weight)


def bias_parameter(layer: nn.Module) -> nn.Parameter | None:
    """The bias itself, also where torch's parametrize computes `layer.bias` from it; None where there is none."""
    if parametrize.is_parametrized(layer, "bias"):
        return cast(Any, layer).parametrizations.bias.original
    return cast("nn.Parameter | None", getattr(layer, "bias", None))


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight in codes (torchao, bitsandbytes, torch's own) and not as ordinary numbers."""
    weight = weight_parameter(layer)
    if type(weight) in (Tensor, nn.Parameter):
        return not weight.is_floating_point()
    return not weight.is_floating_point() or type(weight).dequantize is not Tensor.dequantize


def dequantize(layer: nn.Module) -> Tensor:
    """The layer's weight as ordinary numbers, in the layer's own orientation.

    One dispatch per quantization backend, none of which is imported before a layer of its own is met.

    Raises:
        TargetError: a quantized weight of an unknown kind.
    """
    weight: Any = weight_parameter(layer)
    if not is_quantized(layer):
        return weight
    if type(weight).dequantize is not Tensor.dequantize or weight.is_quantized:  # torchao; torch's own
        return weight.dequantize()
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes, 4 bits: packed, its shape lies in the state
        from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = getattr(weight, "SCB", None)  # bitsandbytes, 8 bits: one scale per row; the first forward may move it
    scales = getattr(getattr(layer, "state", None), "SCB", None) if scales is None else scales
    if weight.dtype is torch.int8 and scales is not None:
        return weight.data * (scales / 127.0)[:, None]
    raise TargetError(
        f"{type(layer).__name__} keeps its weight as {weight.dtype} ({type(weight).__name__}), which rankwise cannot "
        "dequantize; load the model without quantization, with torchao, or with bitsandbytes"
    )


def target_of(name: str, module: nn.Module) -> Target | None:
    """The target a module would be, or None for a kind that rankwise does not know."""
    layout = layout_of(module)
    if layout is None:
        return None
    if layout.kind == "embedding":
        return Target(name, module, layout, int(module.embedding_dim), int(module.num_embeddings))  # type: ignore[arg-type]
    if isinstance(layout, ConvLayout):
        n = layout.channels * torch.Size(layout.kernel).numel()
        return Target(name, module, layout, int(module.out_channels), n)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return Target(name, module, layout, module.out_features, module.in_features)
    n, m = cast(Tensor, module.weight).shape  # transformers' Conv1D
    return Target(name, module, layout, m, n)


def find_targets(model: nn.Module, where: Where, exclude: Iterable[str] = ()) -> tuple[dict[str, Target], dict[str, str]]:
    """The layers to adapt, and what was left out with the reason.

    Args:
        model: any module.
        where: "all-linear" (every linear layer but the output head of a language model), "all-conv", "all-layers" (both), one
            name or several, or a predicate (name, module) -> bool. A name fits a module whose dotted path ends with it.
        exclude: modules that are trained whole instead.

    Raises:
        TargetError: nothing matches, a name matches nothing, or a match cannot be adapted.
    """
    modules = {name: module for name, module in model.named_modules() if ".adapter." not in f".{name}."}
    looped = [name for name, module in modules.items() if hasattr(type(module), "_rankwise_looped")]
    if looped:
        raise TargetError(
            f"{shorten(looped)} share their weights with other depths (relaxed_recursive), so an adapter here would act, or be "
            "merged, at all of them; call unroll_() first"
        )
    if isinstance(where, str) and where in _GROUPS:
        return _whole_group(model, modules, where, tuple(exclude))
    if callable(where):
        chosen = [name for name, module in modules.items() if where(name, module)]
        if not chosen:
            raise TargetError(f"the predicate in where= chose none of the model's {len(modules)} modules")
    else:
        chosen = _named(modules, [where] if isinstance(where, str) else list(where))
    targets: dict[str, Target] = {}
    for name in sorted(chosen, key=list(modules).index):  # the model's order, so that an optimizer's state finds its tensors
        target = target_of(name, modules[name])
        if target is None:
            inside = [other for other in modules if other.startswith(f"{name}.") and layout_of(modules[other]) is not None]
            hint = f"; did you mean the layers inside it: {shorten(inside)}?" if inside else ""
            raise TargetError(
                f"{name} is a {type(modules[name]).__name__}, which cannot be adapted (known: Linear, Conv1D, Conv1d/2d/3d, "
                f"Embedding){hint}"
            )
        targets[name] = target
    skipped = {
        name: "not named in where=" for name, module in modules.items() if name not in targets and layout_of(module) is not None
    }
    return targets, skipped


def _whole_group(
    model: nn.Module, modules: dict[str, nn.Module], where: str, exclude: tuple[str, ...]
) -> tuple[dict[str, Target], dict[str, str]]:
    from rankwise.core.bypass import bypass_of  # which looks at targets itself

    heads = output_heads(model)
    targets: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    for name, module in modules.items():
        target = target_of(name, module)
        if target is None:
            continue
        if any(name == other or name.startswith(f"{other}.") for other in exclude):
            skipped[name] = "trained whole"
        elif name in heads:
            skipped[name] = f"output head, left out by where={where!r}; name it in where= to adapt it"
        elif target.layout.kind not in _GROUPS[where]:
            skipped[name] = f"{type(module).__name__}, not in where={where!r}"
        elif (reason := bypass_of(model, name)) is not None:
            skipped[name] = f"{reason}; adapt it with binding='weight'"
        else:
            targets[name] = target
    if not targets:
        kinds = sorted({type(module).__name__ for module in modules.values() if layout_of(module) is not None})
        raise TargetError(
            f"where={where!r} found no layer to adapt; the model's adaptable layers are of kind {', '.join(kinds) or 'none'}"
        )
    return targets, skipped


def _named(modules: dict[str, nn.Module], names: Sequence[str]) -> list[str]:
    chosen: list[str] = []
    unmatched: list[str] = []
    for wanted in names:
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            unmatched.append(wanted)
        chosen.extend(name for name in found if name not in chosen)
    if unmatched:
        ends = {name.rsplit(".", 1)[-1] for name in modules if name} | set(modules) - {""}
        hints = " ".join(f"{wanted!r} matches nothing. {did_you_mean(wanted, ends)}" for wanted in unmatched)
        matched = f" ({len(chosen)} layers matched the other names; nothing was changed)" if chosen else ""
        raise TargetError(f"where={list(names)!r}: {hints}{matched}")
    if not chosen:
        raise TargetError("where= is empty; name at least one layer, or use 'all-linear'")
    return chosen


def output_heads(model: nn.Module) -> set[str]:
    """Names of the layers that turn hidden states into token scores."""
    known = ("lm_head", "embed_out", "output_projection")
    heads = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in known}
    getter = getattr(model, "get_output_embeddings", None)
    head = None
    if callable(getter):
        try:
            head = getter()
        except (NotImplementedError, AttributeError):
            head = None
    if head is not None:
        heads |= {name for name, module in model.named_modules() if module is head}
    return heads


def tied_with(model: nn.Module, name: str) -> list[str]:
    """Other parameters of the model that share this layer's weight storage."""
    weight = weight_parameter(model.get_submodule(name))
    return [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and other.removesuffix(".weight") != name and not other.startswith(f"{name}.parametrizations")
    ]
