"""Run by torchrun with two processes: trains under one way of distributing, and writes what came out for the test to compare."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.sharding import is_sharded, whole
from tests.interop.models import TOKENS, llama, stir

RECIPES = {
    "lora": "lora(rank=4) + sgd(momentum=0.9)",
    "lora_adamw": "lora(rank=4)",
    "dora": "dora(rank=3) + sgd(momentum=0.9)",
    "vera": "vera(rank=6) + sgd(momentum=0.9)",
}
STEPS, ROWS, RATE = 4, 4, {"lora_adamw": 1e-2}


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, TOKENS, (ROWS, 8), generator=generator)


def make(kind: str) -> rw.Handle:
    handle = rw.adapt_(llama(), rw.compose(RECIPES[kind]), seed=3)
    stir(handle.model, size=0.05)
    return handle


def train(handle: rw.Handle, model: nn.Module, kind: str, rank: int, world: int) -> dict[str, Tensor]:
    optimizer = handle.optimizer(lr=RATE.get(kind, 0.3))
    model.train()
    for step in range(STEPS):
        ids = batch(step).chunk(world)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return tensors(handle)


def tensors(handle: rw.Handle) -> dict[str, Tensor]:
    found = {f"{site}.{role}": tensor for site, block in handle.blocks().items() for role, tensor in block.items()}
    return {name: whole(tensor.detach()).clone().contiguous() for name, tensor in found.items()}


def under_ddp(handle: rw.Handle) -> nn.Module:
    return nn.parallel.DistributedDataParallel(handle.model)


def under_fsdp(handle: rw.Handle) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = handle.model
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(is_sharded(tensor) for block in handle.blocks().values() for tensor in block.values())
    return model


def under_trainer(folder: Path) -> dict[str, Tensor]:
    """The Trainer with DDP: SAM's second pass and a checkpoint in the middle; then again from that checkpoint."""
    from tests.interop.test_trainer import rows, trainer

    def run(resume: str | None) -> dict[str, Tensor]:
        handle = rw.adapt_(llama(), rw.compose("lora(rank=4, dropout=0.2) + sam(rho=0.05) + sgd(momentum=0.9)"), seed=3)
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
        loop = trainer(
            handle, folder / "run", lr=0.3, data=rows(32), per_device_train_batch_size=1, ddp_backend="gloo", **settings
        )
        loop.train(resume_from_checkpoint=resume)
        return tensors(handle)

    first = run(None)
    again = run(str(folder / "run" / "checkpoint-2"))
    return first | {f"resumed.{name}": tensor for name, tensor in again.items()}


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if mode == "trainer":
        save_file(under_trainer(folder), folder / f"trainer.{rank}.safetensors")
    else:
        for kind in RECIPES:
            handle = make(kind)
            model = under_ddp(handle) if mode == "ddp" else under_fsdp(handle)
            save_file(train(handle, model, kind, rank, world), folder / f"{kind}.{rank}.safetensors")
            if mode == "fsdp" or rank == 0:
                handle.save(folder / kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
