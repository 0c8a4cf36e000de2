"""Tiny models with quantized layers, one per backend."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BACKENDS = ("torchao int8", "torchao int4", "bitsandbytes nf4", "bitsandbytes int8")


def library(name: str) -> Any:
    """An optional library; what it says while it is imported concerns nobody here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def quantize(model: nn.Module, backend: str) -> nn.Module:
    """A copy of a model with every linear layer quantized."""
    quantized = copy.deepcopy(model)
    if backend.startswith("torchao"):
        library("torchao")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerGroup

            # Int4WeightOnlyConfig needs a GPU; the same format without its packing runs anywhere.
            four: Any = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
            quantize_(quantized, Int8WeightOnlyConfig() if backend.endswith("int8") else four)
        return quantized
    bnb = library("bitsandbytes")
    for name, module in list(quantized.named_modules()):
        if type(module) is nn.Linear and not name.endswith("lm_head"):
            parent, _, last = name.rpartition(".")
            setattr(quantized.get_submodule(parent) if parent else quantized, last, _bitsandbytes(bnb, module, backend))
    return quantized


def _bitsandbytes(bnb: Any, layer: nn.Linear, backend: str) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if backend.endswith("nf4"):
        made = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
    else:
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def plain(seed: int = 0) -> nn.Module:
    """The model before it is quantized, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64, bias=False))


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
