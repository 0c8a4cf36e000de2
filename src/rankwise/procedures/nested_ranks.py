"""Ordered factors: the penalty that orders them, what each direction is worth, and the cuts that are drawn in training.

B (m, R), A (R, n);  suffixes B[:, b:], A[b:],  b = 0 … R-1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

from rankwise.approximations.starting import check_choice
from rankwise.core.queries import root
from rankwise.core.randomness import generator_for

KINDS = ("per_layer", "across_layers")


def _squares(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) squared norms of the columns of B and the rows of A."""
    return B.square().sum(0), A.square().sum(1)


def _suffixes(squares: Tensor) -> Tensor:
    """(R,) sums from each place on."""
    return squares.flip(0).cumsum(0).flip(0)


def group_lasso(B: Tensor, A: Tensor, hierarchical: bool = True) -> Tensor:
    """Σ_b (‖B[:, b:]‖_F + ‖A[b:]‖_F), or of columns and rows alone; its gradient at zeros is zero."""
    parts = [_suffixes(squares) if hierarchical else squares for squares in _squares(B, A)]
    return torch.stack([root(part).sum() for part in parts]).sum()


def importance(B: Tensor, A: Tensor) -> Tensor:
    """(R,) ‖B[:, b:]‖_F ‖A[b:]‖_F, which falls with b."""
    left, right = (_suffixes(squares).sqrt() for squares in _squares(B, A))
    return left * right


class Sampler:
    """Draws cuts without end: {site: b} of the sites that are cut, the others are whole.

    Args:
        ranks: site -> R; those of rank 0 are never cut.
        kind: "per_layer" or "across_layers".
        seed: of the draws.
    """

    def __init__(self, ranks: Mapping[str, int], kind: str = "per_layer", seed: int = 0) -> None:
        self.ranks, self.kind, self.seed = dict(ranks), check_choice("sampler", kind, KINDS), seed
        self.pairs = [(site, b) for site, rank in ranks.items() for b in range(1, rank + 1)]
        self._round, self._order = -1, [0]

    def __iter__(self) -> Iterator[dict[str, int]]:
        return map(self.draw, count())

    def draw(self, number: int) -> dict[str, int]:
        """The draw of a number, from 0."""
        if not self.pairs:
            return {}
        if self.kind == "across_layers":
            generator = generator_for(self.seed, "maestro", number)
            return {site: int(torch.randint(1, rank + 1, (), generator=generator)) for site, rank in self.ranks.items() if rank}
        turn, place = divmod(number, len(self.pairs))
        if turn != self._round:
            generator = generator_for(self.seed, "maestro", turn)
            self._round, self._order = turn, torch.randperm(len(self.pairs), generator=generator).tolist()
        return dict([self.pairs[self._order[place]]])
