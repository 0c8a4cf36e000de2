"""A hash of the frozen weights that an adapter was trained on, so that it is not loaded onto another model by mistake."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from rankwise.core.bank import to_bytes
from rankwise.core.bindings import Adapters
from rankwise.core.errors import FingerprintError, shorten
from rankwise.core.sharding import is_sharded, whole
from rankwise.core.targets import Target, dequantize, is_quantized, weight_parameter


def weight_hash(layer: nn.Module) -> str:
    """A hash of one layer's untouched weight, rounded to bfloat16, so that loading in another precision does not change it.

    Kept on the layer until the weight changes; merged and absorbed parts do not count. Codes count by their numbers.
    """
    adapters = layer._modules.get("adapter")
    if is_quantized(layer):  # its codes have no one address and version to be kept under
        return tensor_hash(dequantize(layer).detach())
    parameter = weight_parameter(layer)
    weight: Tensor = parameter
    if isinstance(adapters, Adapters) and adapters.stash is not None:
        weight = adapters.stash
    local = cast(Any, weight).to_local() if is_sharded(weight) else weight  # this process's part, where training sharded it
    key = (local.data_ptr(), local._version, tuple(weight.shape), weight.dtype)
    cached = layer.__dict__.get("_rankwise_hash")
    if cached is not None and cached[0] == key:
        return cast(str, cached[1])
    value = tensor_hash(whole(weight))
    layer.__dict__["_rankwise_hash"] = (key, value)
    return value


def tensor_hash(weight: Tensor) -> str:
    """The hash of a weight by its shape and its numbers, rounded to bfloat16."""
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + to_bytes(weight)).hexdigest()[:16]


def fingerprint_of(model: nn.Module, targets: Mapping[str, Target]) -> Callable[[], dict[str, str]]:
    """A function that gives site -> weight hash; computed when first asked for, since hashing a large model takes a while."""
    return lambda: {site: weight_hash(target.module) for site, target in targets.items()}


def check_fingerprint(stored: Mapping[str, str], here: Mapping[str, str], *, source: str) -> None:
    """Compares the weights under an adapter with those it was trained on.

    Raises:
        FingerprintError: they differ.
    """
    different = [site for site, value in stored.items() if here.get(site) != value]
    if different:
        raise FingerprintError(
            f"{source} was trained on another base: {len(different)} of {len(stored)} weights differ ({shorten(different)}). "
            "Load the base it was trained on, or pass any_base=True if you mean to put it on this one"
        )
