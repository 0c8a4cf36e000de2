"""Zeroth-order training: a gradient estimated from two losses, without backward.

    x    all trained tensors together (every B and A, a head beside them), d numbers
    u    a random direction, drawn again from its seed (see `directions`)
    c    (L(x + λu) - L(x - λu)) / 2λ      same batch, no dropout
    g    c u, or the mean over q directions; whatever step is composed with it moves by g (plain SGD unless said otherwise)

E[g] is the gradient of E_u L(x + λu) = L(x) + (λ²/2) tr ∇²L(x) + O(λ⁴): of the minima, those with a small Hessian trace are
preferred. `difference="forward"` takes (L(x + λu) - L(x)) / λ, of which q directions share L(x) and which loses that symmetry;
"derivative" is the limit λ -> 0, c = ⟨∇L, u⟩ by forward-mode differentiation: the same noise without the preference.
The variance grows with d, so few trained numbers and a small rate are wanted.

Nothing is kept for backward. The memory beside the model is that of `.grad`, which holds a copy of the trained tensors while
losses are evaluated, from which x comes back to the bit. With plain SGD the run is the list `log` of (seed, coefficient,
learning rate), from which `replay_` makes the weights again to the bit. Over processes the losses are averaged, and all draw
the same u. Trained numbers and export: those of the parameterization. Cost: 2 forwards per direction (1 + q, and 1 per
direction, for the other differences), and drawing u on the CPU three times.

*Differs* from MeZO: restored by copying, where adding and subtracting λu leaves rounding behind; momentum and decay belong to
the step that it is composed with. The loss reported is the mean of those evaluated.

Zhang, Li, Thekumparampil, Oh, Muehlebach, He: Zeroth-Order Optimization Finds Flat Minima, 2025, arXiv:2506.05454.
Malladi et al.: Fine-Tuning Language Models with Just Forward Passes, 2023, arXiv:2305.17333.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, Problem, TrainingError
from rankwise.core.handle import Handle
from rankwise.core.piece import register
from rankwise.core.protocols import Perturbation
from rankwise.core.recipe import Recipe
from rankwise.core.step import Block
from rankwise.perturbations import directions as engine

DIFFERENCES = ("central", "forward", "derivative")


@register("perturbation")
class ZerothOrder(Perturbation):
    """Two-point estimates of the gradient.

    Args:
        smoothing: λ.
        directions: q, how many are averaged.
        distribution: of u, "gaussian" or "sphere" (of radius √d).
        difference: "central", "forward" or "derivative".
        seed: of the directions.
    """

    forward_only = True

    def __init__(
        self,
        *,
        smoothing: float = 1e-3,
        directions: int = 1,
        distribution: str = "gaussian",
        difference: str = "central",
        seed: int = 0,
    ) -> None:
        if difference not in DIFFERENCES:
            raise ArgumentError(f"difference is one of {', '.join(DIFFERENCES)}, not {difference!r}")
        if not smoothing > 0 or directions < 1:
            raise ArgumentError(f"smoothing > 0 and directions >= 1 are needed, not {smoothing} and {directions}")
        self.smoothing, self.directions, self.difference, self.seed = smoothing, directions, difference, seed
        self.distribution = engine.checked_distribution(distribution)
        self.log: list[tuple[int, float, float]] = []
        self.count = 0  # directions drawn so far

    @classmethod
    def problems_with(cls, recipe: Recipe, **arguments: Any) -> list[Problem]:
        """Nothing may rely on backward."""
        return engine.without_backward(recipe, cls.__name__)

    def direction(self, blocks: Mapping[str, Block], seed: int) -> dict[str, dict[str, Tensor]]:
        """The direction of a seed, by site and role."""
        found: dict[str, dict[str, Tensor]] = {}
        for site, role, u in engine.drawn(blocks, seed, self.distribution):
            found.setdefault(site, {})[role] = u
        return found

    @torch.no_grad()
    def estimate(self, blocks: Mapping[str, Block], evaluate: Callable[[], Tensor], *, learning_rate: float) -> Tensor:
        """Puts the mean of c u into the gradients."""
        seeds = [engine.seed_of(self.seed, self.count + k) for k in range(self.directions)]
        self.count += self.directions
        with engine.Visits(blocks, self.distribution) as visits:
            loss, slopes = self._slopes(visits, seeds, evaluate)
            terms = [(seed, slope / self.directions) for seed, slope in zip(seeds, slopes, strict=True)]
            visits.end_with_gradient(terms)
        if all(math.isfinite(coefficient) for _, coefficient in terms):  # else no step is taken
            self.log += [(seed, coefficient, learning_rate) for seed, coefficient in terms]
        return loss

    def _slopes(
        self, visits: engine.Visits, seeds: Sequence[int], evaluate: Callable[[], Tensor]
    ) -> tuple[Tensor, list[float]]:
        """The loss to report, and c of every direction."""
        if self.difference == "derivative":
            pairs = [engine.slope_along(visits.blocks, seed, self.distribution, evaluate) for seed in seeds]
            values = engine.averaged([part for pair in pairs for part in pair])  # (2q,)
            return values[0], values[1::2].tolist()
        ahead = [[(seed, self.smoothing)] for seed in seeds]
        others = [[(seed, -self.smoothing)] for seed in seeds] if self.difference == "central" else [[]]
        values = engine.averaged([visits.at(point, evaluate) for point in (*ahead, *others)])
        ends, starts = values[: len(seeds)], values[len(seeds) :]  # (q,), (q,) or (1,)
        width = self.smoothing * (2 if self.difference == "central" else 1)
        loss = values.mean() if self.difference == "central" else starts[0]
        return loss, ((ends - starts) / width).tolist()

    def state_dict(self) -> dict[str, Any]:
        """How many directions were drawn, and the log."""
        return {"count": self.count, "log": torch.tensor(self.log, dtype=torch.float64).reshape(-1, 3)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the next direction."""
        self.count = int(state["count"])
        self.log = [(int(seed), coefficient, rate) for seed, coefficient, rate in state["log"].tolist()]


@torch.no_grad()
def replay_(handle: Handle, log: Sequence[tuple[int, float, float]]) -> None:
    """Takes the steps of a log again, from where the trained tensors are.

    Args:
        handle: an adapter as it was at the beginning of the run, with the same recipe.
        log: `handle.perturbation.log` of the run, or its first so many steps.

    Raises:
        TrainingError: the recipe does not step by plain SGD along zeroth-order estimates, or the log has half a step.
    """
    part = handle.perturbation
    if not isinstance(part, ZerothOrder) or not engine.is_plain_sgd(handle.recipe):
        raise TrainingError(
            f"replay_ takes plain SGD steps of a recipe such as 'lora + zeroth_order', and {handle.recipe.name!r} is another; "
            "adapt the model with the recipe of the run that wrote the log"
        )
    count = part.directions
    if len(log) % count:
        raise TrainingError(f"the log holds {len(log)} directions, and {count} make a step; is it the log of this recipe?")
    blocks = {**handle.blocks(), **handle.plain_blocks()}
    for start in range(0, len(log), count):
        entries = log[start : start + count]
        engine.descend_(blocks, [entry[:2] for entry in entries], entries[0][2], part.distribution)
