"""A layer U S Vᵀ that takes the steps of the projector-splitting integrator with augmented bases; see `procedures/dlrt.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Chain, Operator
from rankwise.core.parameterization import Additive, Facts, Site
from rankwise.core.piece import register
from rankwise.parameterizations.factored import REPLACED, TURNED, Factors, bare
from rankwise.parameterizations.integrator import basis, fewest, placed, turned

Transports = dict[str, Callable[[Tensor], Tensor] | None]


class IntegratedFactors(Factors):
    """Interface: factors whose bases are widened between the passes of a step, and cut after it.

    Args:
        site: the layer.
        rank: r at the start.
        max_rank: R; None is min(m, n) / 2, and r at least.
        adaptive: whether the rank may change, for which the tensors have 2R columns in place of r.
        start: "svd" or "random".
        idle: whether S starts at zero.
    """

    def __init__(self, site: Site, *, rank: int, max_rank: int | None, adaptive: bool, start: str, idle: bool = False) -> None:
        if max_rank is not None and max_rank < rank:
            raise ArgumentError(f"max_rank is at least the rank to start from, {rank}, not {max_rank}")
        smaller = min(site.m, site.n)
        self.adaptive, self.most = adaptive, rank
        if adaptive:
            self.most = max(rank, smaller // 2) if max_rank is None else min(max_rank, smaller)
        super().__init__(site, rank=rank, room=2 * self.most if adaptive else rank, start=start, idle=idle)
        self.core_only = False  # in the second pass of a step, where the bases stay

    @classmethod
    def renewals(cls) -> frozenset[str]:
        return frozenset({"augment", "truncate"})

    def trained(self) -> Operator:
        """U S Vᵀ with the gradients that the integrator reads."""
        U, S, V = self.factors()
        if not torch.is_grad_enabled():
            return self.product()
        if not self.U.requires_grad:
            return Chain(U, S, V.mT)
        if self.core_only:  # the bases stay in the graph, since DDP waits for their gradients
            return Chain(U.detach(), S + 0.0 * (self.U[0, 0] + self.V[0, 0]), V.detach().mT)
        return bare(U, S, V)

    def renew(self, what: str, generator: torch.Generator, **arguments: Any) -> Mapping[str, Callable[[Tensor], Tensor] | None]:
        return self._augment(**arguments) if what == "augment" else self._truncate(**arguments)

    def _augment(self, *, learning_rate: float) -> Transports:
        """The K and L steps: new bases (m, w) and (n, w), and the core in them; nothing where the pass gave no gradient."""
        if self.U.grad is None or self.V.grad is None:
            return {}
        (U, S, V), r = self.factors(), self.active
        g_U, g_V = self.U.grad[:, :r], self.V.grad[:, :r]  # G V (m, r), Gᵀ U (n, r)
        if self.adaptive:
            left, right = basis(torch.cat([U, g_U], dim=1)), basis(torch.cat([V, g_V], dim=1))  # (m, 2r), (n, 2r)
        else:
            left = basis(U @ S - learning_rate * g_U)  # (m, r)
            right = basis(V @ S.mT - learning_rate * g_V)  # (n, r)
        M, N = left.mT @ U, right.mT @ V  # (w, r)
        self._put(left, M @ S @ N.mT, right)
        self.core_only = True
        return {"S": partial(turned, matrices=(M, N))}

    def _truncate(self, *, tolerance: float, absolute: bool, min_rank: int, freeze: bool = False) -> Transports:
        """The SVD of the core and the cut; only the end of the step where the rank is fixed."""
        found: Transports = {}
        if self.core_only and self.adaptive:
            U, S, V = self.factors()
            a, b = min(U.shape), min(V.shape)  # the widths without the zeros behind a basis wider than the layer
            P, d, Qh = torch.linalg.svd(S[:a, :b])
            r = fewest(d, tolerance, absolute=absolute, least=min_rank, most=self.most)
            P, Q = P[:, :r], Qh[:r].mT  # (a, r), (b, r)
            self._put(U[:, :a] @ P, torch.diag(d[:r]), V[:, :b] @ Q)
            found = {"S": partial(turned, matrices=(P.mT, Q.mT))}
        self.core_only = False
        if freeze:
            for tensor in (self.U, self.V):
                tensor.requires_grad_(False)
        return found

    def _put(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        self.activate(S.shape[0])
        for tensor, value in ((self.U, U), (self.S, S), (self.V, V)):
            tensor.copy_(placed(value, tensor))


@register("parameterization")
class Integrated(IntegratedFactors):
    """W' = U S Vᵀ.

    Args:
        site: the layer.
        rank, max_rank, adaptive, start: as for `IntegratedFactors`.
    """

    facts = REPLACED

    def __init__(
        self, site: Site, *, rank: int = 16, max_rank: int | None = None, adaptive: bool = True, start: str = "svd"
    ) -> None:
        super().__init__(site, rank=rank, max_rank=max_rank, adaptive=adaptive, start=start)

    def forward(self, base: Operator) -> Operator:
        return self.trained()


@register("parameterization")
class IntegratedBeside(IntegratedFactors, Additive):
    """W' = W + U S Vᵀ, S zero at the start.

    Args:
        site: the layer.
        rank, max_rank, adaptive, start: as for `IntegratedFactors`.
    """

    facts = Facts(expected_failures=TURNED)

    def __init__(
        self, site: Site, *, rank: int = 16, max_rank: int | None = None, adaptive: bool = True, start: str = "svd"
    ) -> None:
        super().__init__(site, rank=rank, max_rank=max_rank, adaptive=adaptive, start=start, idle=True)

    def update(self) -> Operator:
        return self.product()

    def forward(self, base: Operator) -> Operator:
        return Sum(base, self.trained())
