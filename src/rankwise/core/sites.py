"""From a layer to adapt (`Target`) to what a method may know of it (`Site`)."""

from __future__ import annotations

import functools

import torch

from rankwise.core.parameterization import Site
from rankwise.core.randomness import MaskStream
from rankwise.core.targets import Target, weight_parameter


def site_of(target: Target, seed: int, masks: MaskStream) -> Site:
    """The site of a target.

    Half-precision and quantized layers get float32 master tensors; compute stays in the layer's own dtype.
    """
    weight = weight_parameter(target.module)
    return Site(
        name=target.name,
        m=target.m,
        n=target.n,
        layout=target.layout,
        weight=target.matrix,
        seed=seed,
        dtype=weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32,
        device=weight.device,
        thin=functools.partial(masks.thin, site=target.name),
        mask=functools.partial(masks.mask, site=target.name),
        once=masks.once,
        shape=target.mode_shape(),
    )
