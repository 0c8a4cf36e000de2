"""COLA: a chain of LoRAs within one budget; each is trained from zero on the merged result of those before.

    stage k:  min over (B_k, A_k) of L(W_{k-1} + s B_k A_k)          from B_k = 0, A_k drawn anew
    a knot:   W_k = W_{k-1} + s B_k A_k;  a fresh optimizer, counters too

After M stages the change is Σ_k s B_k A_k, of rank up to Σ r_k, and it is exact as one LoRA of that rank: the factors of past
stages are carried, so a save is [B_1 … B_M], [A_1; …; A_M] beside the plain base. The function does not move at a knot (dropout
aside). If every stage were solved exactly, ½‖W − W*‖² would be left with the tail beyond the leading Σ r_k singular values: a
greedy, Frank-Wolfe-like approximation. Data go on; the number of steps and batches is that of LoRA with the same total. A
learning rate that falls should begin again at each knot: `relora_schedule` with the same interval. Trained numbers and FLOPs
are LoRA's.

It is no ReLoRA: that goes on for many cycles of pretraining, keeps the optimizer's counter and may keep a part of its moments.

*Differs*: s stays what it is for the first rank when later stages are narrower, so that the carried factors concatenate; knots
come at fixed step counts, not at a plateau of the validation loss.

Xia, Qin, Hazan: Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning, 2024, arXiv:2401.04151.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Restart
from rankwise.core.step import Block


@register("procedure")
class ChainOfLoRA(Procedure):
    """A knot every `interval` steps.

    Args:
        interval: optimizer steps of a stage.
        ranks: rank of the second stage, the third, …; the last one holds for all that follow. None keeps the first rank.
    """

    restarts: ClassVar[bool] = True

    def __init__(self, *, interval: int = 200, ranks: Sequence[int] | None = None) -> None:
        if interval < 1:
            raise ArgumentError(f"interval is at least 1 step, not {interval}")
        self.interval, self.ranks = interval, None if ranks is None else tuple(ranks)
        self.narrows = ranks is not None
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1 or list(self.ranks) != sorted(self.ranks)[::-1]):
            raise ArgumentError(f"ranks are those of the stages after the first, at least 1 and never growing, not {ranks!r}")

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Ties a knot at every site at the end of a stage."""
        stage, inside = divmod(step + 1, self.interval)
        if inside:
            return {}
        rank = None if self.ranks is None else self.ranks[min(stage, len(self.ranks)) - 1]
        return dict.fromkeys(blocks, Restart("fresh", rank))
