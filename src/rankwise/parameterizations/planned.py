"""Parameterizations around another one whose gains are read off the current tensors, and kept while nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from rankwise.core.bank import Bank
from rankwise.core.combinators import Sum
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Base, Operator
from rankwise.core.parameterization import Site
from rankwise.parameterizations.inner import Wrapping
from rankwise.parameterizations.plan import Plan, can_plan


class Planned(Wrapping):
    """Interface: computes gains from V = W + U, in training in every forward, in eval without gradients once (see `plan.py`).

    Args:
        site: the layer.
        dropout: probability of dropping an input wherever the result differs from W x.
        detach_norm: treat norms as constants in backward.
    """

    bank: Bank | None

    def __init__(self, site: Site, *, dropout: float, detach_norm: bool) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout is a probability in [0, 1), not {dropout}")
        self.dropout, self.thin, self.detach_norm = dropout, site.thin, detach_norm
        self.plan = Plan()
        object.__setattr__(self, "bank", site.bank)  # a child of the model's root already

    def direction(self, base: Operator) -> Operator:
        """V (m, n)."""
        return base if self.inner is None else Sum(base, self.inner.update())

    def gain(self, trained: Tensor, operator: Operator, norms_of: Callable[[Operator], Tensor]) -> Tensor:
        """Trained / norms, where a norm of zero leaves its zeros as they are."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norms = norms_of(operator)
        return trained / torch.where(norms > 0, norms, 1.0)

    def kept(self, base: Operator, compute: Callable[[Operator], Tensor]) -> Tensor:
        """compute(base), from the plan where nothing changed."""
        sources = self._sources(base)
        found = None if sources is None else self.plan.find(sources)
        if found is None:
            found = compute(base)
            if sources is not None:
                self.plan.keep(sources, found)
        return found

    def _sources(self, base: Operator) -> list[Tensor] | None:
        """Every tensor that the gains depend on, or None where they must be computed afresh."""
        if torch.compiler.is_compiling():
            return None
        first = base.terms[0] if isinstance(base, Sum) else base
        weight = first.plain_weight() if isinstance(first, Base) else None
        if self.training or torch.is_grad_enabled() or weight is None:
            self.plan.drop()
            return None
        shared = [] if self.bank is None else [*self.bank.parameters(), *self.bank.buffers()]
        sources = [weight, *self.parameters(), *self.buffers(), *shared]
        return sources if can_plan(sources) else None

    def train(self, mode: bool = True) -> Self:
        self.plan.drop()
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.plan.drop()
        super()._load_from_state_dict(*arguments, **keywords)
