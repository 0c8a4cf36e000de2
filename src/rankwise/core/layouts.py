"""What an (m, n) matrix means in a layer: m = outputs, n = inputs, a layer is y = W x + b.

A layout is a small frozen value. It turns a weight tensor into its matrix and back, and knows four moves, from which
every operator is built:

    matrix     x (…, n) -> M x                   one dense matrix M (m, n)
    project    x (…, n) -> z = A x               into r channels, A (r, n); a convolution keeps its kernel here
    mix        z (…, r) -> C z                   pointwise between channels, C (q, r) or a diagonal (r,)
    expand     z (…, r) -> y = B z               pointwise out to the m outputs, B (m, r)

In a grouped convolution each group sees its own n = in/groups·kernel inputs, so z holds groups × r channels, and the
update of a group is (rows of B) A: the same matrix B A (m, n) as without groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.core.errors import StatisticsError


class Layout(ABC):
    """Interface: how an (m, n) matrix acts in one kind of layer."""

    kind: ClassVar[str]

    @abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight tensor as its matrix (m, n)."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """The matrix (m, n) in the shape of `weight`."""

    @abstractmethod
    def matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Applies a dense matrix (m, n) to x."""

    @abstractmethod
    def project(self, x: Tensor, factor: Tensor) -> Tensor:
        """Applies A (r, n) to x."""

    @abstractmethod
    def mix(self, z: Tensor, factor: Tensor) -> Tensor:
        """Applies C (q, r), or a diagonal (r,), to projected channels."""

    @abstractmethod
    def expand(self, z: Tensor, factor: Tensor) -> Tensor:
        """Applies B (m, r) to projected channels."""

    @abstractmethod
    def scale_output(self, y: Tensor, scale: Tensor) -> Tensor:
        """Multiplies output i by scale[i], scale (m,)."""

    @abstractmethod
    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """Adds bias (m,) to y."""

    def finish(self, y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The output of a layer whose inputs are token numbers, in the layer's dtype."""
        return y.to(dtype)

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """The inputs as rows (tokens, n), the n that the matrix meets."""

    @abstractmethod
    def output_rows(self, y: Tensor) -> Tensor:
        """The outputs as rows (tokens, m)."""


@dataclass(frozen=True)
class LinearLayout(Layout):
    """`nn.Linear`: weight (m, n), inputs in the last dimension."""

    kind: ClassVar[str] = "linear"
    transposed: bool = False  # transformers' Conv1D keeps its weight as (n, m)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t() if self.transposed else matrix

    def matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def project(self, x: Tensor, factor: Tensor) -> Tensor:
        return F.linear(x, factor)

    def mix(self, z: Tensor, factor: Tensor) -> Tensor:
        return z * factor if factor.dim() == 1 else F.linear(z, factor)

    def expand(self, z: Tensor, factor: Tensor) -> Tensor:
        return F.linear(z, factor)

    def scale_output(self, y: Tensor, scale: Tensor) -> Tensor:
        return y * scale

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias

    def input_rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def output_rows(self, y: Tensor) -> Tensor:
        return y.reshape(-1, y.shape[-1])


@dataclass(frozen=True)
class ConvLayout(Layout):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`, grouped too: weight (m, in/groups, kernel…), n = in/groups · kernel."""

    kind: ClassVar[str] = "conv"
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    channels: int  # input channels of one group
    padding_mode: str
    reversed_padding: tuple[int, ...]  # nn.ConvNd's amounts for F.pad, used when padding_mode is not "zeros"

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.reversed_padding, mode=self.padding_mode), 0
        return convolve(x, weight, None, self.stride, padding, self.dilation, self.groups)

    def _pointwise(self, z: Tensor, factor: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return convolve(z, factor.reshape(*factor.shape, *(1 for _ in self.kernel)), groups=self.groups)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.reshape(weight.shape)

    def matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self._convolve(x, matrix.reshape(matrix.shape[0], self.channels, *self.kernel))

    def project(self, x: Tensor, factor: Tensor) -> Tensor:
        weight = factor.reshape(factor.shape[0], self.channels, *self.kernel)
        return self._convolve(x, self._per_group(weight))

    def mix(self, z: Tensor, factor: Tensor) -> Tensor:
        if factor.dim() == 1:
            return self.scale_output(z, self._per_group(factor))
        return self._pointwise(z, self._per_group(factor))

    def expand(self, z: Tensor, factor: Tensor) -> Tensor:
        return self._pointwise(z, factor)

    def _per_group(self, factor: Tensor) -> Tensor:
        return factor.repeat(self.groups, *(1 for _ in factor.shape[1:])) if self.groups > 1 else factor

    def scale_output(self, y: Tensor, scale: Tensor) -> Tensor:
        return y * scale.reshape(-1, *(1 for _ in self.kernel))

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias.reshape(-1, *(1 for _ in self.kernel))

    def input_rows(self, x: Tensor) -> Tensor:
        # A convolution with one identity filter per input column lists the columns the matrix meets.
        n = self.channels * torch.Size(self.kernel).numel()
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        columns = self.project(x, eye)  # (batch, groups·n, positions…)
        columns = columns.reshape(columns.shape[0], self.groups, n, -1)
        return columns.permute(0, 1, 3, 2).reshape(-1, n)

    def output_rows(self, y: Tensor) -> Tensor:
        return y.transpose(0, 1).reshape(y.shape[1], -1).t()


@dataclass(frozen=True)
class EmbeddingLayout(Layout):
    """`nn.Embedding`: the table (n, m) = (tokens, width) is Wᵀ, and x holds token numbers (one-hot columns of W)."""

    kind: ClassVar[str] = "embedding"
    padding_idx: int | None

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def from_matrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.t()

    def matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(x, matrix.t())

    def project(self, x: Tensor, factor: Tensor) -> Tensor:
        return F.embedding(x, factor.t())

    def mix(self, z: Tensor, factor: Tensor) -> Tensor:
        return z * factor if factor.dim() == 1 else F.linear(z, factor)

    def expand(self, z: Tensor, factor: Tensor) -> Tensor:
        return F.linear(z, factor)

    def scale_output(self, y: Tensor, scale: Tensor) -> Tensor:
        return y * scale

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        return y + bias

    def finish(self, y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.padding_idx is not None:  # the padding token is looked up but, as in nn.Embedding, never trained
            y = torch.where((x == self.padding_idx).unsqueeze(-1), y.detach(), y)
        return y.to(dtype)

    def input_rows(self, x: Tensor) -> Tensor:
        raise StatisticsError(
            "input statistics of an embedding are token counts, one row and column per token; leave embeddings out of "
            "`where` for a start or compressor that needs them"
        )

    def output_rows(self, y: Tensor) -> Tensor:
        return y.reshape(-1, y.shape[-1])


def layout_of(layer: nn.Module) -> Layout | None:
    """The layout of a layer, or None for a kind that rankwise does not know.

    transformers' Conv1D is recognized by its attributes (`nf`, a 2-D weight (n, m)), without importing transformers.
    """
    if isinstance(layer, nn.Linear):
        return LinearLayout()
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and not getattr(layer, "transposed", False):
        return ConvLayout(
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            padding=layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            channels=layer.in_channels // layer.groups,
            padding_mode=layer.padding_mode,
            reversed_padding=tuple(cast(Any, layer)._reversed_padding_repeated_twice),
        )
    if isinstance(layer, nn.Embedding):
        return EmbeddingLayout(padding_idx=layer.padding_idx)
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and isinstance(weight, Tensor) and weight.dim() == 2:
        return LinearLayout(transposed=True)
    return None
