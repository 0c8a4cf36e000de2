"""Ranking oracles, and the graph of pairs that an answer gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.core.errors import TrainingError
from rankwise.perturbations.directions import Visits, Weighted, averaged, processes

Oracle = Callable[[Sequence[Callable[[], Tensor]]], Sequence[int]]  # tries -> positions of the best, best first


def signed_edges(levels: Sequence[float], ranked: Collection[int]) -> tuple[list[int], int]:
    """Edges that end at each try less those that begin there, and how many edges there are.

    Args:
        levels: of every try, smaller is better; equal ones get no edge.
        ranked: positions of those whose place is known; an edge begins at one of them.
    """
    edges = [(i, j) for i in ranked for j in range(len(levels)) if levels[i] < levels[j]]
    return [sum((i == j) - (i == k) for k, j in edges) for i in range(len(levels))], len(edges)


def ask(
    oracle: Oracle | None, visits: Visits, points: Sequence[Weighted], evaluate: Callable[[], Tensor], best: int
) -> tuple[list[float], list[int], Tensor]:
    """Levels of all points, positions of the `best` of them in order, and the losses that were asked for.

    Args:
        oracle: None compares losses.
        visits: goes to the points.
        points: the tries.
        evaluate: gives what the oracle looks at.
        best: how many it ranks.

    Raises:
        TrainingError: the oracle's answer is none.
    """
    if oracle is None:
        losses = averaged([visits.at(point, evaluate) for point in points])  # (m,)
        levels = [value if math.isfinite(value) else math.inf for value in losses.tolist()]
        return levels, sorted(range(len(points)), key=levels.__getitem__)[:best], losses
    seen: list[Tensor] = []

    def tried(point: Weighted) -> Tensor:
        seen.append(visits.at(point, evaluate))
        return seen[-1]

    answer = _of_first_process([int(index) for index in oracle([lambda point=point: tried(point) for point in points])])
    ranked = answer[:best]
    if len(set(ranked)) < best or not set(ranked) <= set(range(len(points))):
        raise TrainingError(
            f"the oracle is to name the {best} best of {len(points)} tries by position, best first; it answered {answer}"
        )
    levels = [float(ranked.index(index)) if index in ranked else float(best) for index in range(len(points))]
    losses = [value.reshape(()).float() for value in seen if value.numel() == 1]
    return levels, ranked, torch.stack(losses) if losses else torch.empty(0)


def _of_first_process(answer: list[int]) -> list[int]:
    if processes() == 1:
        return answer
    shared: list[Any] = [answer]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
