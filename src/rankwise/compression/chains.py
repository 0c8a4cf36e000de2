"""One layer as two or three small ones, with ordinary torch layers inside: what a low-rank kernel becomes for deployment.

    channel_chain   B (m, r), A (r, n)      the layer's kernel into r channels, then pointwise (see `factorized.py`)
    spatial_chain   (in·k₁) × (out·k₂…)     a kernel along k₁ into r channels, then one along the rest
    filter_chain    (in) × (k₁·k₂…) per output   pointwise into r channels per output, then each output's own kernels
    tucker_chain    core ×₁ U_out ×₂ U_in   pointwise into r_in, the core's kernel into r_out, pointwise out

Stride, padding, dilation, groups and padding mode go to the layer that has the kernel (each direction to the one that has it),
the bias to the last one; no first layer has a bias, so padded borders stay zero. Linear layers have no kernel: there spatial is
channel, and a Tucker chain is three linears. Exact where the kernel has the rank asked for, else its best approximation of that
form. The bias, dtype, device, mode and `requires_grad` of the layer are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.approximations.truncated_svd import check_rank
from rankwise.compression.factorized import factorized
from rankwise.core.errors import TargetError
from rankwise.core.layouts import ConvLayout
from rankwise.core.operators import LowRank
from rankwise.core.targets import Target, target_of


def channel_chain(layer: nn.Module, B: Tensor, A: Tensor) -> nn.Sequential:
    """The layers `A` and `B` for the matrix B A (m, n); of rank 0, one direction of zeros."""
    target = _target(layer)
    if A.shape[0] == 0:
        B, A = B.new_zeros(target.m, 1), A.new_zeros(1, target.n)
    return factorized(target, LowRank(B, A))


def spatial_chain(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two convolutions, one along the first direction of the kernel and one along the others, of r channels (per group).

    Raises:
        ArgumentError: the matrix has no such rank.
    """
    target = _target(layer)
    if not isinstance(target.layout, ConvLayout):
        U, S, Vh = _svd(target.matrix(), rank)  # (m, r), (r,), (r, n)
        return channel_chain(layer, U, S[:, None] * Vh)
    layout, g = target.layout, target.layout.groups
    first, *others = layout.kernel
    kernel = target.matrix().reshape(g, target.m // g, layout.channels, first, -1)
    U, S, Vh = _svd(kernel.permute(0, 2, 3, 1, 4).reshape(g, layout.channels * first, -1), rank)
    along = U.mT.reshape(g * rank, layout.channels, first, *(1 for _ in others))  # (g·r, in, k₁, 1…)
    rest = (S[..., None] * Vh).reshape(g, rank, target.m // g, -1).transpose(1, 2)
    rest = rest.reshape(target.m, rank, 1, *others)  # (out, r, 1, k₂…)
    return _chain(layer, _part(layer, along, range(1)), _part(layer, rest, range(1, len(layout.kernel)), last=True))


def filter_chain(layer: nn.Module, rank: int) -> nn.Sequential:
    """A pointwise convolution into r channels per output, and one in which every output has a kernel for its own r.

    Raises:
        ArgumentError: the matrices have no such rank.
        TargetError: a layer without a kernel.
    """
    target = _target(layer)
    if not isinstance(target.layout, ConvLayout):
        raise TargetError(f"a {type(layer).__name__} has no kernel to split its filters along; use channel_chain")
    layout, m = target.layout, target.m
    U, S, Vh = _svd(target.matrix().reshape(m, layout.channels, -1), rank)  # (m, in, r), (m, r), (m, r, k)
    pointwise = (U * S[:, None]).mT.reshape(m * rank, layout.channels, *(1 for _ in layout.kernel))
    own = Vh.reshape(m, rank, *layout.kernel)
    return _chain(layer, _part(layer, pointwise, ()), _part(layer, own, range(len(layout.kernel)), groups=m, last=True))


def tucker_chain(layer: nn.Module, core: Tensor, U_out: Tensor, U_in: Tensor) -> nn.Sequential:
    """Pointwise into r_in channels, the core (r_out, r_in, kernel…) with the layer's geometry, pointwise out.

    Raises:
        TargetError: a grouped convolution, where the inputs of a group have no factor of their own.
    """
    target = _target(layer)
    if not isinstance(target.layout, ConvLayout):
        weights = [U_in.mT, core.reshape(core.shape[:2]), U_out]
        return _chain(layer, *(_linear(layer, weight, last=weight is U_out) for weight in weights))
    if target.layout.groups > 1:
        raise TargetError(f"a Tucker chain needs groups=1, this layer has {target.layout.groups}; use channel_chain")
    ones = [1 for _ in target.layout.kernel]
    narrow, wide = U_in.mT.reshape(*U_in.mT.shape, *ones), U_out.reshape(*U_out.shape, *ones)
    middle = _part(layer, core, range(len(ones)))
    return _chain(layer, _part(layer, narrow, ()), middle, _part(layer, wide, (), last=True))


def _target(layer: nn.Module) -> Target:
    target = target_of(type(layer).__name__, layer)
    if target is None:
        raise TargetError(f"{type(layer).__name__} is no layer that can be split (Linear, Conv1D, Conv1d/2d/3d, Embedding)")
    return target


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    check_rank(rank, *matrix.shape[-2:])
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _part(layer: nn.Module, weight: Tensor, directions: Sequence[int], *, groups: int | None = None, last: bool = False) -> Any:
    """A convolution with this weight and the layer's geometry in some directions; in the others it moves pointwise."""
    known = cast(Any, layer)
    count = len(known.kernel_size)
    groups = int(known.groups) if groups is None else groups

    def there(values: Sequence[int], elsewhere: int) -> tuple[int, ...]:
        return tuple(values[k] if k in directions else elsewhere for k in range(count))

    bias = known.bias if last else None
    kind = cast(Any, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[count - 1])
    with torch.device("meta"):  # nothing is drawn, so the global generator stays where it is
        part = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            there(known.stride, 1),
            known.padding if isinstance(known.padding, str) else there(known.padding, 0),
            there(known.dilation, 1),
            groups,
            bias is not None,
            known.padding_mode,
        )
    return _filled(part, layer, weight, bias)


def _linear(layer: nn.Module, weight: Tensor, *, last: bool) -> Any:
    bias = getattr(layer, "bias", None) if last else None
    with torch.device("meta"):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(part, layer, weight, bias)


def _filled(part: Any, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    like = cast(Tensor, layer.weight)
    part.weight = nn.Parameter(weight.detach().to(like).contiguous(), like.requires_grad)
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return part


def _chain(layer: nn.Module, *parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts).train(layer.training)
