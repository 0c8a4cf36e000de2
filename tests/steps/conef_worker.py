"""Run by torchrun with two processes: trains under DDP with compressed gradients. `simulated` does the same in one process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankwise.steps.conef import communication_hook
from rankwise.steps.error_feedback import ErrorFeedback

COMMON: dict[str, Any] = {"share": 0.2, "rank": 2, "ratio": 0.5, "smoothing": 0.9, "memory": "sketch", "start": 2, "seed": 3}
CASES: dict[str, dict[str, Any]] = {
    "none": {"compressor": "none"},
    "block": {"compressor": "block"},
    "powersgd": {"compressor": "powersgd"},
    "powersgd_exact": {"compressor": "powersgd", "memory": "exact", "smoothing": 0.0},
    "top_means": {"compressor": "top", "memory": "means", "smoothing": 0.0},
}
STEPS, RATE, WORLD = 8, 0.05, 2


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return made


def loss(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x, y = (torch.randn(5, size, generator=generator, dtype=torch.float64) for size in (6, 4))
    return (model(x) - y - rank).square().mean()  # the workers pull apart


def simulated(case: str, keys: dict[str, str]) -> tuple[dict[str, Tensor], int]:
    """The tensors after training, and how many numbers each worker sent. `keys` are the hook's, which seed its blocks."""
    model, feedback, sent = network(), ErrorFeedback(**{**COMMON, **CASES[case]}), 0
    named = dict(model.named_parameters())
    kept = [{name: feedback.init(tensor, keys[name]) for name, tensor in named.items()} for _ in range(WORLD)]
    for step in range(STEPS):
        gradients = [torch.autograd.grad(loss(model, step, rank), list(named.values())) for rank in range(WORLD)]
        for index, (name, tensor) in enumerate(named.items()):
            mean, numbers = _averaged(feedback, [g[index] for g in gradients], [k[name] for k in kept], keys[name])
            sent += numbers
            with torch.no_grad():
                tensor.sub_(mean, alpha=RATE)
    return {name: tensor.detach() for name, tensor in named.items()}, sent


def _averaged(feedback: ErrorFeedback, gradients: list[Tensor], kept: list[Any], key: str) -> tuple[Tensor, int]:
    if gradients[0].dim() < 2:
        return sum(gradients) / WORLD, gradients[0].numel()  # type: ignore[return-value]
    exchanges = [feedback.exchange(gradient, own, key) for gradient, own in zip(gradients, kept, strict=True)]
    parts, numbers = [next(exchange) for exchange in exchanges], 0
    while True:
        numbers += parts[0].numel()
        mean = sum(parts) / WORLD
        parts, results = [], []
        for exchange in exchanges:
            try:
                parts.append(exchange.send(mean))  # type: ignore[arg-type]
            except StopIteration as finished:
                results.append(finished.value[1])
        if results:
            assert all(torch.equal(result, results[0]) for result in results)
            return results[0], numbers


def under_ddp(case: str, rank: int) -> dict[str, Any]:
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.0003)  # several buckets
    hook = communication_hook(**{**COMMON, **CASES[case]})
    wrapped.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(wrapped, step, rank).backward()
        optimizer.step()
    named = dict(model.named_parameters())
    tensors = {name: tensor.detach() for name, tensor in named.items()}
    return {"tensors": tensors, "sent": hook.sent, "keys": {name: hook.keys[tensor] for name, tensor in named.items()}}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save({case: under_ddp(case, rank) for case in CASES}, folder / f"{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
