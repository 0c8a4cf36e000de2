"""Layers whose calls say nothing, or not what their weight says, so that an adapter on their path would be wrong.

Some modules read a child's weight without calling it (MultiheadAttention). Some subclasses of a known layer compute something
else than W x + b (a convolution that pads by itself, an embedding that multiplies by a constant): those are run once on a small
probe and compared. Both kinds are adapted right with binding="weight".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.layouts import ConvLayout, EmbeddingLayout
from rankwise.core.randomness import generator_for
from rankwise.core.targets import Target, target_of


def bypass_of(model: nn.Module, name: str) -> str | None:
    """Why an adapter on the path of this layer would not act, or act wrong; None where it is right."""
    parent_name = name.rpartition(".")[0]
    parent = model.get_submodule(parent_name) if parent_name else model
    if isinstance(parent, nn.MultiheadAttention):
        return f"{parent_name or type(parent).__name__} (MultiheadAttention) reads this weight without calling the layer"
    target = target_of(name, model.get_submodule(name))
    if target is None or not _may_differ(target.module) or _computes_its_weight(target):
        return None
    return f"its class {type(target.module).__name__} computes something else than W x + b"


def _may_differ(layer: nn.Module) -> bool:
    """Whether the forward is neither torch's nor transformers' Conv1D's, nor a quantized layer's, and can be tried out."""
    forward: Any = getattr(type(layer), "_rankwise_original", type(layer)).forward
    if forward.__module__.startswith("torch.") or type(layer).__name__ == "Conv1D":
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta


@torch.no_grad()
def _computes_its_weight(target: Target) -> bool:
    layer, layout, weight = target.module, target.layout, target.parameter()
    x = _probe(target, weight)
    training = layer.training
    layer.training = False
    try:
        y = getattr(type(layer), "_rankwise_original", type(layer)).forward(layer, x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        layer.training = training
    expected = layout.matrix(x, layout.to_matrix(weight))
    bias = getattr(layer, "bias", None)
    expected = expected if bias is None else layout.add_bias(expected, bias)
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    loose = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((y - expected).abs().max() <= loose * (expected.abs().max() + 1e-6))


def _probe(target: Target, weight: Tensor) -> Tensor:
    """A small input of the layer: one row, a patch twice as wide as the kernel, or a few token numbers."""
    if isinstance(target.layout, EmbeddingLayout):
        return torch.arange(min(4, target.n), device=weight.device).unsqueeze(0)
    if isinstance(target.layout, ConvLayout):
        layout = target.layout
        sides = [2 * step * (size - 1) + 3 for size, step in zip(layout.kernel, layout.dilation, strict=True)]
        shape = (1, layout.channels * layout.groups, *sides)
    else:
        shape = (1, target.n)
    x = torch.randn(shape, generator=generator_for(0, "probe"), dtype=torch.float64)
    return x.to(device=weight.device, dtype=weight.dtype)
