"""Run by torchrun with two processes: methods whose tensors change their shapes, wrapped again where they say so."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise as rw

RECIPES = {
    "cuttlefish": "cuttlefish(interval=1, window=3, threshold=100.0, rule='plain') + sgd(momentum=0.9)",
    "maestro": "maestro(interval=3, penalty=1e-3, threshold=1.0) + sgd(momentum=0.9)",
}
STEPS = 8


def train(kind: str, rank: int, world: int) -> tuple[dict[str, Tensor], int]:
    """The trained tensors, and how often the model had to be wrapped again."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        x, y = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    handle = rw.adapt_(net, rw.compose(RECIPES[kind]))
    optimizer = handle.optimizer(lr=0.05)
    x, y, wrapped, again = x.chunk(world)[rank], y.chunk(world)[rank], net, 0
    for step in range(STEPS):
        if world > 1 and wrapped is net:
            wrapped, again = nn.parallel.DistributedDataParallel(net), again + (step > 0)
        handle.backward(lambda wrapped=wrapped: (wrapped(x) - y).square().mean())
        optimizer.step()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            handle.after_step()
        if any("wrap handle.model again" in str(item.message) for item in said):
            wrapped = net
        optimizer.zero_grad()
    return {f"{s}.{r}": t.detach().clone() for s, block in handle.blocks().items() for r, t in block.items()}, again


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for kind in RECIPES:
        found, again = train(kind, dist.get_rank(), dist.get_world_size())
        save_file(found | {"again": torch.tensor(again)}, Path(sys.argv[1]) / f"{kind}.{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
