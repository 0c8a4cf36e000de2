"""Run by torchrun with two processes: trains in one distributed way and writes what came out."""

from __future__ import annotations

import gc
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.errors import RankwiseError
from rankwise.core.sharding import is_sharded, whole
from tests.interop.distributed_recipes import KINDS, Kind
from tests.interop.models import TOKENS, conv_net, llama, stir

STEPS, ROWS = 4, 4
RATES = {"lora": 0.3, "dora": 0.3, "vera": 0.3, "tied_lora": 0.3, "intrinsic_dimension": 0.3, "sgd": 0.3}
SETTINGS = {"timeout": timedelta(seconds=60)}  # a collective that only one process calls becomes an error


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, TOKENS, (ROWS, 8), generator=generator)


def images(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(200 + step)
    return torch.rand(ROWS, 3, 9, 8, generator=generator).double(), torch.arange(ROWS) % 5


def makes_its_loss(handle: rw.Handle) -> bool:
    return hasattr(handle.procedure, "loss")


def base_of(kind: Kind) -> nn.Module:
    """A small language model; one for images where the method makes the loss itself."""
    procedure = kind.recipe().procedure
    model = (
        conv_net() if procedure is not None and hasattr(procedure.factory, "loss") else llama(layers=1 if kind.generated else 2)
    )
    return model.double() if kind.generated else model


def make(kind: Kind) -> rw.Handle:
    handle = rw.adapt_(base_of(kind), kind.recipe(), seed=3, train_also=kind.train_also)
    stir(handle.model, size=0.05)
    return handle


def train(handle: rw.Handle, wrap: Callable[[rw.Handle], nn.Module], kind: Kind, rank: int, world: int) -> dict[str, Tensor]:
    model = wrap(handle)
    optimizer = handle.optimizer(lr=RATES.get(kind.name, 1e-2))
    known = identities(handle)
    for step in range(STEPS):
        if kind.wrapped_again and identities(handle) != known:
            model, known = wrap(handle), identities(handle)
        model.train()
        handle.backward(lambda model=model, step=step: loss_of(handle, model, kind, step, rank, world))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return tensors(handle)


def identities(handle: rw.Handle) -> set[int]:
    return {id(tensor) for block in handle.blocks().values() for tensor in block.values()}


def unwrapped(handle: rw.Handle) -> nn.Module:
    return handle.model


def loss_of(handle: rw.Handle, model: nn.Module, kind: Kind, step: int, rank: int, world: int) -> Tensor:
    """The mean over this process's share of the batch."""
    if makes_its_loss(handle):
        x, y = (part.chunk(world)[rank] for part in images(step))
        return handle.procedure.loss(model, x, y)  # type: ignore[union-attr]
    ids = batch(step).chunk(world)[rank]
    if not kind.generated:
        return model(input_ids=ids, labels=ids).loss
    logits = model(input_ids=ids).logits  # (rows, length, tokens); the model's own loss is in float32
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tensors(handle: rw.Handle) -> dict[str, Tensor]:
    """The trained tensors, and the update that is carried in the weight."""
    blocks = {**handle.blocks(), **handle.plain_blocks()}
    found: dict[str, Tensor] = {f"{site}.{role}": tensor for site, block in blocks.items() for role, tensor in block.items()}
    for site in handle.targets:
        carried = handle.parameterization(site).carried()
        if carried is not None:
            found[f"{site}.carried"] = carried.folded().dense()
    return {name: whole(tensor.detach()).clone().contiguous() for name, tensor in found.items()}


def under_ddp(handle: rw.Handle) -> nn.Module:
    return nn.parallel.DistributedDataParallel(handle.model)


def under_fsdp(handle: rw.Handle) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = handle.model
    for layer in model.model.layers if hasattr(model, "model") else ():
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


def one(mode: str, kind: Kind, folder: Path) -> None:
    """Trains and saves one recipe, or writes down how it was refused; what it made is gone at its end."""
    rank = dist.get_rank()
    try:
        handle = make(kind)
        wrap = under_ddp if mode == "ddp" else under_fsdp
        save_file(train(handle, wrap, kind, rank, dist.get_world_size()), folder / f"{kind.name}.{rank}.safetensors")
        if mode == "fsdp" or rank == 0:
            handle.save(folder / kind.name)
    except Exception as error:  # what it may be is for the test to say
        own = isinstance(error, RankwiseError)
        said = {"ours": own, "type": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        (folder / f"{kind.name}.{rank}.json").write_text(json.dumps(said))


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", **SETTINGS)
    if mode.startswith("trainer"):
        rank = dist.get_rank()
        save_file(under_trainer(folder, mode == "trainer_fsdp"), folder / f"trainer.{rank}.safetensors")
    else:
        for kind in (KINDS[name] for name in sys.argv[3:] or KINDS):
            one(mode, kind, folder)
            gc.collect()
    gc.collect()  # a wrapped model that outlives the group can wait for its threads forever
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
