"""ZO-RankSGD: steps from nothing but an order of tries, such as a person's preference.

    x_i = x + μ ξ_i, i = 1..m       ξ_i ~ N(0, I) over all trained tensors, drawn again from seeds (see `directions`)
    an oracle names the k best, best first; that gives edges i -> j for "i is better than j": all pairs of ranked tries, and
    every ranked one against every unranked one, |E| = k(k-1)/2 + k(m-k)
    g = 1/|E| Σ_{i -> j} (x_j - x_i)/μ = 1/|E| Σ w_i ξ_i
    w = 2t - (m-1) for the try of rank t = 0..k-1,  w = k for the unranked

Tries with equal losses get no edge. g is a direction: for linear L its length along the gradient is about 1.13 whatever the
slope (k = m), so the learning rate carries the length. Only the order counts: exp L or a L + b give the same steps to the bit.

With `line_search` = l the oracle then also chooses between x itself and x - η γʲ g, j = 0..l-1, and g is scaled so that plain
SGD goes there (to rounding). Where x wins nothing moves, and g is averaged with the next round's until one wins.

`oracle` is an attribute: any function from a sequence of callables, each of which puts a try in place and gives what the
closure gives there (a loss, a picture), to the positions of the k best, best first. The default asks for losses. Tries come in
the order in which they were drawn and are not shuffled; where a person sees them, shuffle and unshuffle in the oracle. Over
processes losses are averaged; the answer of another oracle counts from process 0.

It is not the comparison oracle of one-bit methods, which is m = 2. Memory as for `zeroth_order`: that of `.grad`. Trained
numbers and export: those of the parameterization. Cost: m forwards per step, 1 + l more with the line search. A round that x
wins adds its m draws to the next.

*Differs* from the released script, whose weights are off by one for ranked tries, and which puts the best try into the line
search too. The loss reported is the mean of the tries'; NaN where the oracle asked for none.

Tang, Rybin, Chang: Zeroth-Order Optimization Meets Human Feedback: Provable Learning via Ranking Oracles, 2023,
arXiv:2303.03751.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, Problem
from rankwise.core.piece import register
from rankwise.core.protocols import Perturbation
from rankwise.core.recipe import Recipe
from rankwise.core.step import Block
from rankwise.perturbations import directions as engine
from rankwise.perturbations.ranking import Oracle, ask, signed_edges


@register("perturbation")
class RankedZerothOrder(Perturbation):
    """Estimates from ranked tries.

    Args:
        candidates: m.
        best: k, how many the oracle ranks; None for all.
        smoothing: μ.
        line_search: l, steps tried along g; 0 for none.
        shrink: γ, of each further step tried.
        seed: of the directions.
    """

    forward_only = True

    def __init__(
        self,
        *,
        candidates: int = 8,
        best: int | None = None,
        smoothing: float = 1e-2,
        line_search: int = 0,
        shrink: float = 0.5,
        seed: int = 0,
    ) -> None:
        ranked = candidates if best is None else best
        if candidates < 2 or not 1 <= ranked <= candidates:
            raise ArgumentError(f"candidates >= 2 and 1 <= best <= candidates are needed, not {candidates} and {best}")
        if not smoothing > 0 or line_search < 0 or not 0 < shrink < 1:
            raise ArgumentError(
                f"smoothing > 0, line_search >= 0 and 0 < shrink < 1 are needed, not {smoothing}, {line_search} and {shrink}"
            )
        if shrink != 0.5 and line_search < 2:
            raise ArgumentError(f"shrink={shrink} has no effect with line_search={line_search}; use line_search=2 or more")
        self.candidates, self.best, self.smoothing, self.seed = candidates, ranked, smoothing, seed
        self.line_search, self.shrink = line_search, shrink
        self.oracle: Oracle | None = None
        self.count = 0  # directions drawn so far
        self.rounds = 1  # whose mean `kept` belongs to, this one counted
        self.kept: list[tuple[int, float]] = []  # terms of the rounds that x won

    @classmethod
    def problems_with(cls, recipe: Recipe, **arguments: Any) -> list[Problem]:
        """Nothing may rely on backward, and a line search means the steps that it tries."""
        found = engine.without_backward(recipe, cls.__name__)
        if arguments.get("line_search") and not engine.is_plain_sgd(recipe):
            found.append(
                Problem(
                    piece=f"{cls.__name__} with line_search",
                    needs="plain SGD, which takes the very step that won",
                    has=f"steps {' and '.join(map(str, recipe.step))}",
                    remedy="leave the step out, or line_search",
                )
            )
        return found

    @torch.no_grad()
    def estimate(self, blocks: Mapping[str, Block], evaluate: Callable[[], Tensor], *, learning_rate: float) -> Tensor:
        """Puts Σ w ξ / |E| into the gradients."""
        seeds = [engine.seed_of(self.seed, self.count + k) for k in range(self.candidates)]
        self.count += self.candidates
        with engine.Visits(blocks) as visits:
            tries = [[(seed, self.smoothing)] for seed in seeds]
            levels, ranked, losses = ask(self.oracle, visits, tries, evaluate, self.best)
            signed, edges = signed_edges(levels, ranked)
            terms = [(seed, weight / max(edges, 1)) for seed, weight in zip(seeds, signed, strict=True)]
            if all(math.isinf(level) for level in levels):
                terms = [(seeds[0], math.nan)]  # no try has a loss at all; what looks for NaN in gradients will tell
            elif self.line_search:
                terms = self._searched(visits, terms, evaluate, learning_rate)
            visits.end_with_gradient(terms)
        return losses.mean() if len(losses) else torch.tensor(math.nan)

    def _searched(
        self, visits: engine.Visits, terms: engine.Weighted, evaluate: Callable[[], Tensor], rate: float
    ) -> engine.Weighted:
        """The step along the mean of g since x won last that the oracle likes best; none where it likes x best."""
        together = [*self.kept, *terms]
        sizes = [0.0, *(self.shrink**j / self.rounds for j in range(self.line_search))]
        moves = [[(seed, -rate * size * weight) for seed, weight in together if size] for size in sizes]
        _, ranked, _ = ask(self.oracle, visits, moves, evaluate, 1)
        size = sizes[ranked[0]]
        self.kept, self.rounds = (together, self.rounds + 1) if size == 0 else ([], 1)
        return [(seed, size * weight) for seed, weight in together if size]

    def state_dict(self) -> dict[str, Any]:
        """How many directions were drawn, and what the line search averages."""
        return {"count": self.count, "rounds": self.rounds, "kept": [list(term) for term in self.kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the next direction."""
        self.count, self.rounds = int(state["count"]), int(state["rounds"])
        self.kept = [(int(seed), float(weight)) for seed, weight in state["kept"]]


def weights(m: int, k: int) -> list[int]:
    """W by rank, the unranked m - k last."""
    return signed_edges([float(min(rank, k)) for rank in range(m)], range(k))[0]
