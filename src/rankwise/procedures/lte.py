"""LTE: train from scratch with parallel low-rank heads that are averaged into the main weight every few steps.

    every T steps   W' = W + (1/H) Σ_h s·B_h A_h       see `parameterizations.parallel_heads`

In one process all heads are trained in one batched pass. Under torch.distributed every process trains heads of its own on its
own data, without a DDP wrapper, and nothing is sent between merges; whatever is trained beside the adapter (norms, embeddings,
a head) is a replica in each process, and replicas are averaged at each merge. Evaluate right after a merge: in between the main
weight is older than the heads. Take H r at least as large as the layers, s large, and a learning rate 10 to 20 times smaller
than usual; AdamW without weight decay.

*Differs*: replicas have the learning rate of everything else; in one process there is only one of them.

Huh, Cheung, Bernstein, Isola, Agrawal: Training Neural Networks from Scratch with Parallel Low-Rank Adapters, 2024,
arXiv:2402.16828.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist

from rankwise.core.errors import ArgumentError
from rankwise.core.piece import register
from rankwise.core.protocols import Decision, Procedure, Renew
from rankwise.core.step import Block


@register("procedure")
class LoRATheExplorer(Procedure):
    """Merges the heads of every site every `interval` steps.

    Args:
        interval: T, optimizer steps between merges.
        reset: absorb the average and begin every B_h at zero, instead of letting the heads go on.
    """

    renews: ClassVar[frozenset[str]] = frozenset({"merge"})
    separate: ClassVar[bool] = True

    def __init__(self, *, interval: int = 10, reset: bool = False) -> None:
        if interval < 1:
            raise ArgumentError(f"interval is at least 1 step, not {interval}")
        self.interval, self.reset = interval, reset

    def decide(self, step: int, blocks: Mapping[str, Block], *, learning_rate: float) -> Mapping[str, Decision]:
        """Merges every site at the end of an interval."""
        if (step + 1) % self.interval:
            return {}
        return {site: Renew("merge", {"reset": self.reset}) for site, block in blocks.items() if "A_heads" in block}

    @torch.no_grad()
    def after_step(self, step: int, beside: Mapping[str, Block]) -> None:
        """Averages the replicas of what is trained beside the adapter, at the end of an interval."""
        if (step + 1) % self.interval or not (dist.is_available() and dist.is_initialized()):
            return
        for block in beside.values():
            for tensor in block.values():
                dist.all_reduce(tensor)
                tensor /= dist.get_world_size()
