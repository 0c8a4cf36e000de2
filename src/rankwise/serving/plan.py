"""What one batch asks of a bank: which slot each row uses, worked out once and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BASE = -1  # the slot of a row that uses the frozen base alone


class Segment(NamedTuple):
    """The rows of a batch that use one slot.

    Attributes:
        slot: of the bank.
        start, stop: their places in the sorted batch.
        rows: (k,) their places in the batch, ascending.
        first: the first of them where they stand in a run, so that a view reaches them; None where they are scattered.
    """

    slot: int
    start: int
    stop: int
    rows: Tensor
    first: int | None


class BatchPlan:
    """Sort permutation, segments and distinct slots of a batch.

    Attributes:
        slots: one per row; `BASE` for the frozen base.
        rows: number of rows.
        distinct: slots in use, ascending, without `BASE`.
        segments: the rows of each slot in use, the base's left out.
        order: (rows,) row of the batch at each sorted place.
        inverse: (rows,) sorted place of each row.
        active: (k,) rows that use an adapter.
        gather: (k,) their slots.
        consecutive: whether those are slots s, s+1, ….
        scattered: rows that no view reaches segment by segment.
    """

    def __init__(self, slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.slots = tuple(int(slot) for slot in slots)
        self.rows = len(self.slots)
        by_slot = sorted(range(self.rows), key=self.slots.__getitem__)
        self.order = torch.tensor(by_slot, dtype=torch.long, device=device)
        self.inverse = torch.argsort(self.order)
        self.segments = self._segments(by_slot)
        self.distinct = tuple(segment.slot for segment in self.segments)
        used = [row for row, slot in enumerate(self.slots) if slot != BASE]
        self.all_active = len(used) == self.rows
        self.active = torch.tensor(used, dtype=torch.long, device=device)
        self.gather = torch.tensor([self.slots[row] for row in used], dtype=torch.long, device=device)
        # Slots s, s+1, …, one row each: the stack itself is what gathering would copy.
        self.consecutive = bool(used) and all(self.slots[row] == self.slots[used[0]] + step for step, row in enumerate(used))
        self.scattered = sum(segment.stop - segment.start for segment in self.segments if segment.first is None)

    def _segments(self, by_slot: list[int]) -> tuple[Segment, ...]:
        found: list[Segment] = []
        start = 0
        for place in range(1, self.rows + 1):
            slot = self.slots[by_slot[start]]
            if place < self.rows and self.slots[by_slot[place]] == slot:
                continue
            rows = by_slot[start:place]
            run = rows[-1] - rows[0] + 1 == len(rows)
            if slot != BASE:
                found.append(Segment(slot, start, place, self.order[start:place], rows[0] if run else None))
            start = place
        return tuple(found)

    def __repr__(self) -> str:
        return f"BatchPlan({self.rows} rows, {len(self.distinct)} adapters, {self.slots.count(BASE)} rows on the base)"
