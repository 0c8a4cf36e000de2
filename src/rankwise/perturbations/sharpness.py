"""Sharpness-aware minimization: the gradient is taken at the worst point of a small ball around the weights.

    w    all trained tensors together (for LoRA every B and A, and a head trained beside them), or the factors B and A alone
    g    ∇L(w)
    ε    ρ D (D C h) / ‖D C h‖         one norm over everything, in float32 or wider
    g'   ∇L(w + ε)                     same batch, same dropout masks; the optimizer steps from w with g'

It is the ascent direction on the linearized loss, with C on the objective and D on the ball ‖D⁻¹ ε‖ <= ρ, both diagonal:

    direction    "gradient"  h = g                             SAM
                 "average"   h = (1 - θ) h + θ g               VaSSO: one noisy batch cannot choose its own adversary
                 "noise"     h = g, C = diag(v)^(-p/2)         infoSAM: v is the variance of g per entry over steps
    metric       "none"      D = I
                 "weights"   D = diag(|w|)                     ASAM: rescaling a tensor and its partner changes nothing; a
                                                               LoRA factor that starts at zero is not moved then
                 "fisher"    D = diag(F)^(-1/2)                Fisher SAM: F is the running mean of g², so ρ has its units

`damping` and `condition` bound C and D, so that entries that never saw a gradient do not take the ball for themselves. Only
gradients at w enter averages. It is not a penalty: the gradient through ε is dropped. The weights come back from copies, never
by subtraction, so ρ = 0 is the plain optimizer to the bit. Trained numbers and export: those of the parameterization. Cost: a
second forward and backward, and a copy of the trained tensors; one more for an average or F, two for v.

*Differs* from releases: weight decay and moments see w alone, running statistics of normalization layers see the batch once.
infoSAM's release takes the last squared deviation from a mean that holds g already, in place of v, neither averaged nor
bounded. Fisher SAM's paper takes F from the batch at hand.

Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020,
arXiv:2010.01412. Kwon, Kim, Park, Choi: ASAM, 2021, arXiv:2102.11600. Kim, Li, Hu, Hospedales: Fisher SAM, 2022,
arXiv:2206.04920. Li, Giannakis: Enhancing Sharpness-Aware Optimization Through Variance Suppression, 2023, arXiv:2309.15639.
Zhang, Li, Giannakis: Preconditioned Sharpness-Aware Minimization, 2025, arXiv:2501.06603.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Perturbation
from rankwise.core.step import Block
from rankwise.perturbations.ascent import Diagonal, perturbation_of, scaled, square_norm, total, with_gradients
from rankwise.perturbations.averages import Averages
from rankwise.perturbations.bounds import bounded_inverse, check_options

__all__ = ["SharpnessAware", "perturbation_of"]

OVER, FACTORS = ("all", "factors"), frozenset({"A", "B"})


@register("perturbation")
class SharpnessAware(Perturbation):
    """SAM, ASAM, Fisher SAM, VaSSO, infoSAM and what lies between.

    Args:
        rho: ρ, radius of the ball.
        adaptive: short for metric="weights" (ASAM; wants ρ about ten times larger).
        direction, metric: as above.
        theta: θ, the weight of the new gradient in the average.
        smoothing: b of v and F.
        power: p of the noise; 0 is SAM.
        damping, condition: bounds of C and D.
        over: "all" trained tensors, or "factors": those of roles A and B only.
    """

    second_pass = True

    def __init__(
        self,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        direction: str = "gradient",
        metric: str = "none",
        theta: float = 0.9,
        smoothing: float = 0.9,
        power: float = 2.0,
        damping: float = 1e-3,
        condition: float = 1e3,
        over: str = "all",
    ) -> None:
        options = {"theta": theta, "smoothing": smoothing, "power": power, "damping": damping, "condition": condition}
        check_options(direction, "weights" if adaptive and metric == "none" else metric, options)
        if over not in OVER:
            raise ArgumentError(f"over is one of {', '.join(OVER)}, not {over!r}")
        if adaptive and metric not in ("none", "weights"):
            raise ArgumentError(f"adaptive=True is metric='weights', and metric={metric!r} is asked for too; choose one")
        if rho < 0:
            raise ArgumentError(f"rho is a radius and cannot be negative, it is {rho}")
        self.rho, self.direction, self.metric, self.over = rho, direction, "weights" if adaptive else metric, over
        self.theta, self.smoothing, self.power, self.damping, self.condition = theta, smoothing, power, damping, condition
        self.roles = FACTORS if over == "factors" else frozenset()  # type: ignore[misc]  (of this recipe's perturbation)
        self.averages = Averages()
        self._copies: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def move(self, blocks: Mapping[str, Block], *, learning_rate: float) -> None:
        """Goes from w to w + ε."""
        moved = list(with_gradients(blocks, self.roles))
        if not moved:
            return
        weights, gradients = [tensor for _, tensor, _ in moved], [gradient for *_, gradient in moved]
        C, D, ascent = self._preconditioned([name for name, *_ in moved], weights, gradients)
        factor, directions = scaled(ascent, C, D, self.rho)
        self._copies = [(tensor, tensor.detach().clone()) for tensor in weights]
        for tensor, direction in zip(weights, directions, strict=True):
            tensor.add_(direction.to(tensor.dtype), alpha=factor)

    def _preconditioned(
        self, names: Sequence[str], weights: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[Diagonal, Diagonal, Sequence[Tensor]]:
        """C, D and h."""
        C: Diagonal = None
        D: Diagonal = [tensor.abs() for tensor in weights] if self.metric == "weights" else None
        ascent, bounds = gradients, {"damping": self.damping, "condition": self.condition}
        keeps = self.direction != "gradient" or self.metric == "fisher"
        if not keeps or not math.isfinite(float(total(square_norm(gradient) for gradient in gradients))):
            return C, D, ascent  # a gradient scaler skips steps that are not finite, and averages must not hold them
        named = list(zip(names, gradients, strict=True))
        for name, gradient in named:
            self.averages.see(name, gradient)
        if self.direction == "average":
            ascent = [self.averages.average(name, gradient, self.theta) for name, gradient in named]
        elif self.direction == "noise":
            noise = [self.averages.variance(name, gradient, self.smoothing) for name, gradient in named]
            C = bounded_inverse(noise, gradients, power=self.power, scale=False, **bounds)
        if self.metric == "fisher":
            squares = [self.averages.square(name, gradient, self.smoothing) for name, gradient in named]
            D = bounded_inverse(squares, gradients, power=1.0, scale=True, **bounds)
        return C, D, ascent

    @torch.no_grad()
    def restore(self, blocks: Mapping[str, Block]) -> None:
        """Copies w back, to the bit."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)
        self._copies = []

    def state_dict(self) -> dict[str, Any]:
        """The averages, by "site.role"."""
        return self.averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them back."""
        self.averages.load_state_dict(state)
