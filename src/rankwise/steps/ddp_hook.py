"""Compressed gradients with error feedback as a communication hook of DistributedDataParallel.

All that one round of a bucket sends goes out in one all-reduce; PowerSGD takes two rounds, the others one. Each worker keeps
the error of its own gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.steps.compressors import Exchange, Kept
from rankwise.steps.error_feedback import ErrorFeedback


class CommunicationHook:
    """What `communication_hook` makes. `sent` counts the numbers this worker has sent, `keys` names tensors for seeds."""

    def __init__(self, feedback: ErrorFeedback, group: dist.ProcessGroup | None) -> None:
        self.feedback, self.group, self.sent = feedback, group, 0
        self.__name__ = self.__qualname__ = "conef"  # DDP asks a hook for its names
        self._kept: dict[Tensor, Kept] = {}  # by parameter: DDP sorts them into other buckets after the first backward
        self.keys: dict[Tensor, str] = {}

    def __call__(self, state, bucket):  # DDP compares annotations as objects, so there are none
        """One bucket: a future of its averaged buffer."""
        parameters, gradients = bucket.parameters(), bucket.gradients()
        exchanges = [self._exchange(*pair) for pair in zip(parameters, gradients, strict=True)]
        waiting = dict(enumerate(exchanges))
        sent = {index: next(exchange) for index, exchange in waiting.items()}

        def receive(flat: Tensor) -> None:
            received = self._split(flat, list(sent.values()))
            sent.clear()
            for index, mean in zip(list(waiting), received, strict=True):
                try:
                    sent[index] = waiting[index].send(mean)
                except StopIteration as finished:
                    gradients[index].copy_(finished.value[1])
                    del waiting[index]

        def last(future: torch.futures.Future[Any]) -> Tensor:
            receive(future.value()[0])
            return bucket.buffer()

        if self.feedback.compressor == "powersgd":  # its first round is waited for: rounds of two buckets must not interleave
            receive(self._reduce(list(sent.values())).wait()[0])
        if not sent:
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done
        return self._reduce(list(sent.values())).then(last)

    def _exchange(self, parameter: Tensor, gradient: Tensor) -> Exchange:
        if parameter not in self._kept:
            self.keys[parameter] = str(len(self.keys))  # backward runs in the same order on every worker
            self._kept[parameter] = self.feedback.init(gradient, self.keys[parameter])
        if gradient.dim() < 2:
            return _whole(gradient)
        return self.feedback.exchange(gradient, self._kept[parameter], self.keys[parameter])

    def _reduce(self, parts: list[Tensor]) -> torch.futures.Future[Any]:
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.sent += flat.numel()
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        return work.get_future()

    def _split(self, flat: Tensor, like: list[Tensor]) -> list[Tensor]:
        means = (flat / dist.get_world_size(self.group)).split([part.numel() for part in like])
        return [mean.view_as(part) for mean, part in zip(means, like, strict=True)]


def _whole(gradient: Tensor) -> Exchange:
    """A tensor of one dimension is sent as it is."""
    return gradient, (yield gradient)


def communication_hook(
    *,
    compressor: str = "powersgd",
    share: float = 0.1,
    rank: int = 4,
    ratio: float = 0.2,
    smoothing: float = 0.9,
    memory: str = "sketch",
    start: int = 10,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> CommunicationHook:
    """Error feedback inside DDP, for `model.register_comm_hook(None, hook)`. Arguments as for `conef`.

    The gradients must not be scaled (AMP's scaler), or the kept errors would carry the scale of another step.
    """
    feedback = ErrorFeedback(
        compressor=compressor,
        share=share,
        rank=rank,
        ratio=ratio,
        smoothing=smoothing,
        memory=memory,
        start=start,
        seed=seed,
    )
    return CommunicationHook(feedback, group)
