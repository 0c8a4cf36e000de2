"""Noise on the weight of one site, whose size follows the row norms of weight, update and last gradient."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import TrainingError
from rankwise.core.operators import LowRank, Operator
from rankwise.core.parameterization import Parameterization
from rankwise.core.queries import as_low_rank, full_precision, square_row_norms
from rankwise.perturbations.directions import process
from rankwise.perturbations.noise import Noisy
from rankwise.perturbations.rows import gradient_row_squares, kohya_variances, product_row_squares, row_variances


class SiteNoise:
    """Wraps one site's adapted operator; picklable.

    Attributes:
        step: which step's noise it is.
        gradient: ‖Ĝ_i‖² (m,) of the last step; None before the first.
        plain: whether the update is scale · B A of the site's own tensors B and A.
        used: v of this step, once a forward has run.
    """

    def __init__(self, sigma: float, beta: float, variant: str, key: tuple[int, str, str]) -> None:
        self.sigma, self.beta, self.variant, self.key = sigma, beta, variant, key
        self.step, self.plain = 0, False
        self.gradient: Tensor | None = None
        self.used: Tensor | None = None
        self._seen: tuple[weakref.ref[Parameterization], Tensor, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def entry(self) -> Parameterization | None:
        """The parameterization that it has wrapped, if it is still there."""
        return None if self._seen is None else self._seen[0]()

    @torch.no_grad()
    def __call__(self, entry: Parameterization, adapted: Operator) -> Operator:
        """The operator of one forward in training mode."""
        base = getattr(adapted, "terms", (adapted,))[0]
        self._seen = (weakref.ref(entry), square_row_norms(base), adapted.shape[1])
        self.used = None
        v = self.used = self.variances()
        if not self.sigma and (self.variant == "paper" or not self.beta):
            return adapted
        return Noisy(adapted, v.sqrt(), (*self.key, process(), self.step))

    @torch.no_grad()
    def variances(self) -> Tensor:
        """V (m,)."""
        entry = self.entry()
        if self.used is not None:
            return self.used
        if entry is None or self._seen is None:
            raise TrainingError(f"{self.key[2]} has no noise yet; run a forward in training mode first")
        _, W, n = self._seen
        factors, carried = factors_of(entry), entry.carried()
        tensors = entry.roles()
        self.plain = factors.B is tensors.get("B") and factors.A is tensors.get("A")
        with full_precision():
            factors = factors.folded()
            if carried is not None and not entry.absorbed:
                factors = LowRank(torch.cat([factors.B, carried.B], 1), torch.cat([factors.A, carried.A], 0))
            BA = product_row_squares(factors.B, factors.A)
        G = torch.zeros_like(BA) if self.gradient is None else self.gradient.to(BA)
        if self.variant == "kohya":
            return kohya_variances(W.to(BA), BA, G, self.sigma, self.beta)
        return row_variances(W.to(BA), BA, G, n, self.sigma, self.beta)

    def guide(self, B: Tensor, A: Tensor, g_B: Tensor, g_A: Tensor, scale: float) -> None:
        """Takes ‖Ĝ_i‖² off the factors and their gradients; rows where it overflows count as zero."""
        squares = scale**2 * gradient_row_squares(B, A, g_B, g_A)
        self.gradient = torch.where(torch.isfinite(squares), squares, 0.0)


def factors_of(entry: Parameterization) -> LowRank:
    """The exact factors of the update, in the graph of its tensors."""
    factors = as_low_rank(entry.update())
    if factors is None:
        raise TypeError(f"{type(entry).__name__} says its update has factors, and it has none; this is a bug in rankwise")
    return factors
