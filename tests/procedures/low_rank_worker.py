"""Run by torchrun with two processes: trains layers of low rank, half of every batch on each, and writes what came out."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise
from rankwise.core.sharding import whole

RECIPES = {
    "dlrt": "dlrt(rank=4, tolerance=0.12)",
    "dlrt_adamw": "dlrt(rank=2, tolerance=0.05, keep_base=True) + adamw",
    "dlrt_fixed": "dlrt(rank=3, adaptive=False)",
    "tucker_dlrt": "tucker_dlrt(tolerance=0.12, min_rank=1)",
    "sst": "sst(rank=2, interval=2, warmup=0, iterations=2) + sgd(momentum=0.5)",
    "condlr": "condlr(tau=1.5, momentum=0.3)",
}
SHARDED = ("condlr",)  # the others decide about whole tensors and say so
STEPS, ROWS, RATE = 6, 8, {"dlrt_adamw": 0.01}


def make(kind: str) -> rankwise.Handle:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.Tanh(), nn.Linear(12, 10)]
        model = nn.Sequential(*layers).double()
    return rankwise.adapt_(model, rankwise.compose(RECIPES[kind]), where=["0", "3"], train_also=["5"])


def train(handle: rankwise.Handle, model: nn.Module, kind: str, rank: int, world: int) -> dict[str, Tensor]:
    optimizer = handle.optimizer(lr=RATE.get(kind, 0.2))
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(ROWS, 3, 4, 4, generator=generator, dtype=torch.float64).chunk(world)[rank]
        y = torch.randn(ROWS, 10, generator=generator, dtype=torch.float64).chunk(world)[rank]
        handle.backward(lambda x=x, y=y: (model(x) - y).square().mean())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return result(handle)


def result(handle: rankwise.Handle) -> dict[str, Tensor]:
    plain = {f"{owner}.{role}": tensor for owner, block in handle.plain_blocks().items() for role, tensor in block.items()}
    found: dict[str, Tensor] = {name: whole(tensor.detach()).clone() for name, tensor in plain.items()}
    for site in handle.targets:
        entry = handle.parameterization(site)
        found |= {f"{site}.{name}": whole(t.detach()).clone().contiguous() for name, t in entry.state_dict().items()}
        if not handle.recipe.name.startswith("condlr"):
            found[f"{site}.update"] = handle.update_of(site).dense().detach().clone()
    return found


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for kind in SHARDED if mode == "fsdp" else RECIPES:
        handle = make(kind)
        model: Any = handle.model
        if mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        else:
            model = nn.parallel.DistributedDataParallel(model)
        save_file(train(handle, model, kind, rank, 2), folder / f"{kind}.{rank}.safetensors")
        del model, handle
    gc.collect()  # a wrapped model that outlives the group can wait for its threads forever
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
