"""Maestro: factors of full inner rank, trained with a prefix cut at random in every step, find their ranks themselves.

    W' = B A          B (m, R), A (R, n), R = min(m, n) at the start (see `parameterizations/nested_factors.py`)
    each step: one layer acts as B[:, :b] A[:b] with b from 1 … R; the others are whole
    loss + λ Σ_b (‖B[:, b:]‖_F + ‖A[b:]‖_F), b = 0 … R-1;   every `interval` steps: R ← #{b: ‖B[:, b:]‖_F ‖A[b:]‖_F ≥ ε}

The first directions serve in every sub-model and the last only in the widest, so they come to be ordered by importance (for
linear data: PCA, the truncated SVD at every b at once). The penalty is hierarchical: direction i is in the suffixes b ≤ i, so
that the last are pulled hardest and reach zero first; `hierarchical=False` penalizes columns and rows each for itself. Suffix
norms fall with b, so what is kept is a prefix, and cutting away what is below ε changes nothing that counts. λ drives the
ranks; ε = 0 keeps all. "per_layer" visits every pair (layer, b) once in a random order and then again in another;
"across_layers" draws a b for every layer in each step. Draws depend on the seed and their number alone.

Trained numbers Σ R(m + n), up to twice those of the matrices at first. One forward per step; the penalty costs O(R(m + n)). At
the end every smaller prefix is a sub-model; `compression.deploy_` makes two small layers where that is smaller.

*Differs* from the release: what falls below ε is cut away with its optimizer state at once, not masked; the loss is that of the
partial model alone (its `no-full-pass`). The step after a pruning keeps the draw of the step before.

Horváth, Laskaridis, Rajput, Wang: Maestro: Uncovering Low-Rank Structures via Trainable Decomposition, 2023, arXiv:2308.14929.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from rankwise.approximations.starting import check_choice
from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Renew, Resize
from rankwise.core.randomness import generator_for
from rankwise.core.step import Block
from rankwise.procedures.nested_ranks import KINDS, Sampler, group_lasso, importance

__all__ = ["Maestro", "Sampler", "group_lasso", "importance"]


@register("procedure")
class Maestro(Procedure):
    """Cuts layers at random, adds the group lasso, and prunes.

    Args:
        penalty: λ.
        threshold: ε.
        interval: steps between prunings.
        sampler: "per_layer" or "across_layers".
        hierarchical: whether suffixes are penalized, or columns and rows.
        seed: of the draws.
    """

    roles: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    renews: ClassVar[frozenset[str]] = frozenset({"cut"})

    def __init__(
        self,
        *,
        penalty: float = 1e-6,
        threshold: float = 1e-5,
        interval: int = 100,
        sampler: str = "per_layer",
        hierarchical: bool = True,
        seed: int = 0,
    ) -> None:
        if interval < 1 or penalty < 0 or threshold < 0:
            raise ArgumentError(
                f"interval is at least 1 step, penalty and threshold at least 0, not {interval}, {penalty} and {threshold}"
            )
        self.penalty, self.threshold, self.interval = penalty, threshold, interval
        self.kind, self.hierarchical, self.seed = check_choice("sampler", sampler, KINDS), hierarchical, seed
        self._sampler, self._drawn, self._prunings = Sampler({}, sampler, seed), 0, 0
        self._narrow: list[str] = []  # sites that are cut now

    def begin(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Decision]:
        """The cuts of the first step."""
        cuts = self._next({site: min(shape[0], math.prod(shape[1:])) for site, shape in shapes.items()})
        self._narrow = list(shapes)  # a file that is loaded now may bring other cuts
        return cuts

    def before_step(self, step: int, blocks: Mapping[str, Block]) -> None:
        """Adds the gradient of λ times the group lasso."""
        for block in self._pairs(blocks).values() if self.penalty else ():
            B, A = (block[role].detach().requires_grad_() for role in "BA")
            with torch.enable_grad():
                value = group_lasso(B, A, self.hierarchical) * self.penalty
            for role, extra in zip("BA", torch.autograd.grad(value, (B, A)), strict=True):
                tensor = block[role]
                tensor.grad = extra if tensor.grad is None else tensor.grad.add_(extra)

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Prunes at the end of an interval; in other steps draws the cuts of the next one."""
        pairs = self._pairs(blocks)
        if (step + 1) % self.interval == 0 and self.threshold:
            keep = {site: importance(block["B"], block["A"]) >= self.threshold for site, block in pairs.items()}
            pruned: dict[str, Decision] = {site: Resize(kept) for site, kept in keep.items() if not bool(kept.all())}
            if pruned:
                self._drawn, self._prunings = 0, self._prunings + 1
                return pruned
        return self._next({site: block["A"].shape[0] for site, block in pairs.items()})

    def _next(self, ranks: Mapping[str, int]) -> Mapping[str, Decision]:
        """The next draw, at the sites that it cuts or no longer cuts."""
        if ranks != self._sampler.ranks:
            seed = generator_for(self.seed, "pruning", self._prunings).initial_seed()
            self._sampler = Sampler(ranks, self.kind, seed)
        cuts, before = self._sampler.draw(self._drawn), self._narrow
        self._drawn, self._narrow = self._drawn + 1, list(cuts)
        return {site: Renew("cut", {"prefix": cuts.get(site)}) for site in ranks if site in cuts or site in before}

    @staticmethod
    def _pairs(blocks: Mapping[str, Block]) -> dict[str, Block]:
        """The sites both of whose factors are trained."""
        return {site: block for site, block in blocks.items() if "A" in block and "B" in block}

    def state_dict(self) -> dict[str, Any]:
        """Where the draws are."""
        return {"drawn": self._drawn, "prunings": self._prunings, "narrow": list(self._narrow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._drawn, self._prunings, self._narrow = int(state["drawn"]), int(state["prunings"]), list(state["narrow"])
