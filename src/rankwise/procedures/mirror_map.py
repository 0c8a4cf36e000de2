"""A learned inverse mirror map: an invertible, triangular function of all trained tensors of a task's model.

    φ = h(z)        z, φ lists of tensors of the same shapes, in network order, in blocks of four
    block 1         φ = exp(w) ∘ z + b                                  w, b trained, entry by entry
    block j         φ = exp(u_j(z_1 … z_{j-1})) ∘ z + t_j(z_1 … z_{j-1})

A block inverse autoregressive flow. Each tensor of the earlier blocks is encoded by three Kronecker-linear layers (a small
matrix per mode, each mode shrunk by two) with ReLU; the embeddings of all earlier blocks meet in one linear layer, and a
decoder of the same make gives log-scale u and shift t per tensor. Kernels of convolutions count as one mode. The Jacobian is
block lower triangular with diagonal exp(·) > 0, so h is inverted block by block. It starts as the identity.

*Differs* from the release: of a last layer's matrices one is zero and the others are drawn, since with all of them at zero
none would ever get a gradient and the map could only learn constants; log-scales are cut at ±10.

Zhang, Li, Giannakis: Meta-Learning with Versatile Loss Geometries for Fast Adaptation Using Mirror Descent, 2023,
arXiv:2312.13486.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError
from rankwise.procedures.kronecker_layers import KroneckerLinear, Shape, levels_of, modes, stack

LIMIT = 10.0  # of log-scales: beyond it exp would overflow float32 within a few products


class MirrorMap(nn.Module):
    """h: dual variables z -> parameters φ.

    Args:
        shapes: of the tensors, in network order, which has to stay the same.
        block: tensors per block.
        shrink: by how much each layer of an encoder divides every mode.
        generator: draws the conditioners; None: a private one.
    """

    def __init__(
        self, shapes: Sequence[Shape], *, block: int = 4, shrink: int = 2, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not shapes or block < 1 or shrink < 1:
            raise ArgumentError(
                f"a mirror map needs tensors, block >= 1 and shrink >= 1, not {len(shapes)} tensors, block={block} and "
                f"shrink={shrink}"
            )
        draw = generator or torch.Generator().manual_seed(0)
        self.shapes = [tuple(shape) for shape in shapes]
        self.blocks = [range(first, min(first + block, len(shapes))) for first in range(0, len(shapes), block)]
        self.log_weight = nn.ParameterList([torch.zeros(self.shapes[k]) for k in self.blocks[0]])
        self.bias = nn.ParameterList([torch.zeros(self.shapes[k]) for k in self.blocks[0]])
        self.levels = [levels_of(modes(shape), shrink) for shape in self.shapes]  # shapes from the tensor down to its embedding
        sizes = [math.prod(levels[-1]) for levels in self.levels]
        read = range(self.blocks[-1].start)  # no conditioner reads the last block
        self.encoders = nn.ModuleList([stack(self.levels[k], draw) for k in read])
        rest = range(self.blocks[0].stop, len(shapes))
        self.decoders = nn.ModuleList([stack(self.levels[k][:0:-1], draw, first=True) for k in rest])
        self.outputs = nn.ModuleList(
            [
                nn.ModuleList([KroneckerLinear(self.levels[k][1], self.levels[k][0], zero=True, generator=draw) for _ in "ut"])
                for k in rest
            ]
        )
        self.joints = nn.ModuleList()
        for indices in self.blocks[1:]:
            inputs, outputs = sum(sizes[: indices.start]), sum(sizes[k] for k in indices)
            self.joints.append(KroneckerLinear((inputs,), (outputs,), generator=draw))

    def forward(self, z: Sequence[Tensor]) -> list[Tensor]:
        """φ = h(z)."""
        pairs = self._conditions(z)
        return [one * scale.exp() + shift for one, (scale, shift) in zip(z, pairs, strict=True)]

    def log_scales(self, z: Sequence[Tensor]) -> list[Tensor]:
        """The logarithms of the Jacobian's diagonal, in the shapes of z."""
        return [scale for scale, _ in self._conditions(z)]

    def inverse(self, phi: Sequence[Tensor]) -> list[Tensor]:
        """The z with h(z) = φ, block by block."""
        self._check(phi)
        z: list[Tensor] = []
        embeddings: list[Tensor] = []
        for number, indices in enumerate(self.blocks):
            pairs = self._of_block(number, embeddings)
            z += [(phi[k] - shift) * (-scale).exp() for k, (scale, shift) in zip(indices, pairs, strict=True)]
            embeddings += self._embedded(indices, z)
        return z

    def _conditions(self, z: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Log-scale and shift of every tensor."""
        self._check(z)
        embeddings = self._embedded(range(len(self.encoders)), z)
        pairs: list[tuple[Tensor, Tensor]] = []
        for number, indices in enumerate(self.blocks):
            pairs += self._of_block(number, embeddings[: indices.start])
        return pairs

    def _embedded(self, indices: range, z: Sequence[Tensor]) -> list[Tensor]:
        """The embeddings of those of the tensors that a later block reads, flattened."""
        read = [k for k in indices if k < len(self.encoders)]
        return [self.encoders[k](z[k].reshape(self.levels[k][0])).flatten() for k in read]

    def _of_block(self, number: int, embeddings: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Log-scales and shifts of one block, from the embeddings of all earlier ones."""
        if number == 0:
            return [(w.clamp(-LIMIT, LIMIT), b) for w, b in zip(self.log_weight, self.bias, strict=True)]
        indices, first = self.blocks[number], self.blocks[0].stop
        joint = self.joints[number - 1](torch.cat(list(embeddings)))
        parts = joint.split([math.prod(self.levels[k][-1]) for k in indices])
        pairs = []
        for k, part in zip(indices, parts, strict=True):
            features = self.decoders[k - first](part.reshape(self.levels[k][-1]))
            scale, shift = (output(features).reshape(self.shapes[k]) for output in cast(Any, self.outputs[k - first]))
            pairs.append((scale.clamp(-LIMIT, LIMIT), shift))
        return pairs

    def _check(self, tensors: Sequence[Tensor]) -> None:
        found = [tuple(tensor.shape) for tensor in tensors]
        if found != self.shapes:
            raise ArgumentError(f"this mirror map is for tensors of shapes {self.shapes}, in this order, not {found}")
