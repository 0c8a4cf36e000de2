"""Rotations from skew matrices, in blocks: what OFT and BOFT share, with the dropout of whole blocks.

    exact     R = (I - Q)(I + Q)⁻¹ = 2 (I + Q)⁻¹ - I                orthogonal, det R = 1, never with an eigenvalue -1
    neumann   R = I - 2Q + 2Q² - … ± 2Qᴷ ∓ Qᴷ⁺¹                     its series, orthogonal up to O(‖Q‖ᴷ⁺¹)

All in at least float32, whatever computes the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.core.errors import Problem
from rankwise.core.layouts import Layout
from rankwise.core.operators import Operator
from rankwise.core.parameterization import Site
from rankwise.core.queries import full_precision, wide


def cayley(Q: Tensor, *, terms: int | None = None) -> Tensor:
    """The rotations (k, b, b) of skew matrices Q (k, b, b); `terms` takes the truncated series instead of the inverse.

    The series has K = max(terms - 2, 2) whole terms and half of the next; with terms 2 it is I - 2Q, with 1 it is I.
    """
    with full_precision():
        Q = wide(Q)
        identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        if terms is None:
            return 2 * torch.linalg.inv(identity + Q) - identity
        rotation = identity.expand_as(Q)
        if terms > 1:
            rotation = rotation - 2 * Q
        if terms > 2:
            power = Q @ Q
            rotation = rotation + 2 * power
            for _ in range(3, terms - 1):
                power = -(power @ Q)
                rotation = rotation + 2 * power
            rotation = rotation - power @ Q
        return rotation


def keep_blocks(blocks: Tensor, kept: Tensor | None) -> Tensor:
    """Blocks (…, b, b), with identities where `kept` (…) is False; None keeps all."""
    if kept is None:
        return blocks
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(kept[..., None, None], blocks, identity)


class BlockDropped(Operator):
    """An operator made of blocks of which each call drops some; `dense` has them all.

    Args:
        build: makes the operator from a mask (blocks,) of those kept, or from None for all.
        count: how many blocks there are.
        probability: of dropping one.
        thin: the site's source of masks, x, probability -> x̃. It knows a forward that is run again by its input, so that
            what it thins here is made from the layer's input.
    """

    def __init__(
        self,
        build: Callable[[Tensor | None], Operator],
        count: int,
        probability: float,
        thin: Callable[[Tensor, float], Tensor],
    ) -> None:
        self.build, self.count, self.probability, self.thin = build, count, probability, thin

    @property
    def shape(self) -> tuple[int, int]:
        return self.build(None).shape

    def dense(self) -> Tensor:
        return self.build(None).dense()

    def apply(self, x: Tensor, layout: Layout) -> Tensor:
        return self.build(self._kept(x)).apply(x, layout)

    def affine(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
        return self.build(self._kept(x)).affine(x, layout, bias)

    def _kept(self, x: Tensor) -> Tensor:
        mark = x.detach().abs().float().mean() + 1.0  # positive, and different for different inputs
        return self.thin(mark.repeat(self.count), self.probability) > 0


def misfit(name: str, site: Site, needs: str, has: str, remedy: str) -> list[Problem]:
    """One problem of a method at one site, as `problems_at` gives it."""
    return [Problem(piece=name, needs=needs, has=has, remedy=remedy, sites=(site.name,))]
