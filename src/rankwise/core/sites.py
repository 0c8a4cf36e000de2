"""What a method may know of a layer (`Site`), and how a layer to adapt (`Target`) becomes one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankwise.core.bank import Bank
from rankwise.core.layouts import Layout
from rankwise.core.randomness import MaskStream, generator_for
from rankwise.core.statistics import LayerStatistics
from rankwise.core.targets import Target, weight_parameter


@dataclass(frozen=True, kw_only=True)
class Site:
    """One layer about to be adapted: what a method may know of it.

    Attributes:
        name: dotted name of the layer in the model.
        m, n: outputs and inputs of its matrix.
        layout: what the matrix means in the layer.
        weight: gives the frozen matrix (m, n), detached, in at least float32.
        seed: of the adapter.
        dtype, device: for new trained tensors.
        thin: thins an input by dropout: x, probability -> x̃ (see `MaskStream`).
        mask: draws a mask of the layer's own: input, shape, probability, dtype -> mask (see `MaskStream`).
        once: a tensor that the layers of one forward share: key, how to make it -> tensor (see `MaskStream.once`).
        bank: tensors shared between the adapter's sites, where the method declared some.
        shape: of the weight tensor in matrix orientation with its modes kept, (out, in, kernel…).
        statistics: what `collect` gathered at this layer, for methods whose `needs_of` asks for some.
        blank: the tensors will be filled from a file, so that nothing needs to be read off the weight or data now; buffers
            must get the right shapes and dtypes and may hold zeros.
    """

    name: str
    m: int
    n: int
    layout: Layout
    weight: Callable[[], Tensor]
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    thin: Callable[[Tensor, float], Tensor] | None = None
    mask: Callable[[Tensor, Sequence[int], float, torch.dtype], Tensor] | None = None
    once: Callable[[Hashable, Callable[[], Any]], Any] | None = None
    bank: Bank | None = None
    shape: tuple[int, ...] = ()
    statistics: LayerStatistics | None = None
    blank: bool = False

    def generator(self, purpose: str = "start") -> torch.Generator:
        """A private CPU generator for this site and purpose."""
        return generator_for(self.seed, self.name, purpose)

    def normal(self, *shape: int, std: float = 1.0, purpose: str = "start") -> Tensor:
        """Gaussian numbers N(0, std²) of the given shape, from the site's private generator."""
        values = torch.randn(*shape, generator=self.generator(purpose), dtype=torch.float64) * std
        return values.to(self.dtype).to(self.device)

    def uniform(self, *shape: int, bound: float, purpose: str = "start") -> Tensor:
        """Uniform numbers in [-bound, bound] of the given shape, from the site's private generator."""
        values = (torch.rand(*shape, generator=self.generator(purpose), dtype=torch.float64) * 2 - 1) * bound
        return values.to(self.dtype).to(self.device)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the dtype of trained tensors."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def cast(self, tensor: Tensor) -> Tensor:
        """A detached copy in the dtype and on the device of trained tensors."""
        return tensor.detach().to(device=self.device, dtype=self.dtype, copy=True)


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
