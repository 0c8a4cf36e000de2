"""Run by torchrun with two processes: trains in one distributed way and writes what came out."""

from __future__ import annotations

import gc
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
    "tied_lora": "tied_lora(rank=4) + sgd(momentum=0.9)",
    "conef": "lora(rank=4) + conef(compressor='powersgd', start=1) + sgd(momentum=0.9)",
    "flora_grad": "full + flora_grad(rank=4, interval=2)",
    "intrinsic_dimension": "intrinsic_dimension(dimension=20) + sgd(momentum=0.9)",
    "infosam": "lora(rank=4) + presam(direction='noise', metric='weights') + sgd(momentum=0.9)",
    "vasso": "lora(rank=4) + vasso(theta=0.4) + sgd(momentum=0.9)",
    "zeroth_order": "lora(rank=4) + zeroth_order(directions=4)",
    "zeroth_order_full": "full + zeroth_order(directions=2, smoothing=0.1, distribution='sphere') + sgd(momentum=0.9)",
    "zo_rank": "lora(rank=4) + zo_rank(candidates=4, line_search=2)",
    "lora_ggpo": "lora(rank=4) + lora_ggpo(sigma=0.1) + sgd(momentum=0.9)",
    "fira": "full + fira(rank=4, refresh=2)",
    "trp": "trp(interval=2, fraction=0.5, nuclear=0.01) + sgd(momentum=0.9)",
    "apollo": "full + apollo(rank=4, refresh=2)",
}
OWN_NOISE = {"lora_ggpo"}  # other on every process
STEPS, ROWS, RATE = (
    4,
    4,
    {"lora_adamw": 1e-2, "zeroth_order": 0.01, "zeroth_order_full": 0.01, "flora_grad": 1e-2, "fira": 1e-2, "apollo": 1e-2},
)


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, TOKENS, (ROWS, 8), generator=generator)


def make(kind: str) -> rw.Handle:
    head = ["lm_head"] if kind == "zeroth_order_full" else []  # in the root's group, which FSDP2 keeps whole after a forward
    handle = rw.adapt_(llama(), rw.compose(RECIPES[kind]), seed=3, train_also=head)
    stir(handle.model, size=0.05)
    return handle


def train(handle: rw.Handle, model: nn.Module, kind: str, rank: int, world: int) -> dict[str, Tensor]:
    optimizer = handle.optimizer(lr=RATE.get(kind, 0.3))
    model.train()
    for step in range(STEPS):
        ids = batch(step).chunk(world)[rank]

        def run(ids: Tensor = ids) -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        if handle.perturbation is not None and handle.perturbation.forward_only:
            handle.backward(lambda ids=ids: model(input_ids=ids, labels=ids).loss)
        else:
            run()
            handle.after_backward(run)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return tensors(handle)


def tensors(handle: rw.Handle) -> dict[str, Tensor]:
    blocks = {**handle.blocks(), **handle.plain_blocks()}
    found = {f"{site}.{role}": tensor for site, block in blocks.items() for role, tensor in block.items()}
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


def under_trainer(folder: Path, sharding: bool) -> dict[str, Tensor]:
    """The Trainer with a checkpoint in the middle; then again from that checkpoint."""
    from tests.interop.test_trainer import rows, trainer

    def run(recipe: str, resume: str | None, name: str) -> dict[str, Tensor]:
        handle = rw.adapt_(llama(), rw.compose(recipe), seed=3)
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
        settings |= {"per_device_train_batch_size": 1, "ddp_backend": "gloo", "lr": 0.3, "data": rows(32)}
        loop = trainer(handle, folder / name, **settings)
        assert loop.args.world_size == 2
        if sharding:
            shard(loop, lambda: lambda model, lr: handle.optimizer(lr))
        loop.train(resume_from_checkpoint=resume)
        assert sharding == any(is_sharded(tensor) for block in handle.blocks().values() for tensor in block.values())
        return tensors(handle)

    plain = "lora(rank=4) + sgd(momentum=0.9)"
    found = {f"plain.{key}": tensor for key, tensor in run(plain, None, "plain").items()}
    hard = plain if sharding else "lora(rank=4, dropout=0.2) + sam(rho=0.05) + sgd(momentum=0.9)"
    found |= {f"first.{key}": tensor for key, tensor in run(hard, None, "hard").items()}
    again = run(hard, str(folder / "hard" / "checkpoint-2"), "hard")
    return found | {f"again.{key}": tensor for key, tensor in again.items()}


def shard(loop: Any, make_optimizer: Any) -> None:
    """Puts the Trainer under FSDP2. Accelerate does so for accelerators only, and falls back to DDP on CPUs without a word."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin

    state = loop.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    loop.is_fsdp_enabled, loop.optimizer, loop.optimizer_cls_and_kwargs = True, None, (make_optimizer, {"lr": 0.3})


def one(mode: str, kind: str, folder: Path) -> None:
    """Trains and saves one recipe; what it made is gone at its end."""
    rank = dist.get_rank()
    handle = make(kind)
    model = under_ddp(handle) if mode == "ddp" else under_fsdp(handle)
    save_file(train(handle, model, kind, rank, dist.get_world_size()), folder / f"{kind}.{rank}.safetensors")
    if mode == "fsdp" or rank == 0:
        handle.save(folder / kind)


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    if mode.startswith("trainer"):
        rank = dist.get_rank()
        save_file(under_trainer(folder, mode == "trainer_fsdp"), folder / f"trainer.{rank}.safetensors")
    else:
        for kind in RECIPES:
            one(mode, kind, folder)
    gc.collect()  # a wrapped model that outlives the group can wait for its threads forever
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
