"""Run by torchrun with two processes: LTE without a wrapper, each process with heads and data of its own."""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.errors import RankwiseError

ROWS, STEPS, RATE = 4, 5, 0.02
TEXT = "lte(rank=2, heads={heads}, alpha=4.0, interval=2, reset={reset})"


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=generator).double(), torch.randn(ROWS, 5, generator=generator).double()


def make(heads: int, reset: bool, train_also: list[str] | None = None) -> rw.Handle:
    recipe = rw.compose(TEXT.format(heads=heads, reset=reset))
    handle = rw.adapt_(model(), recipe, where=["0", "3"], train_also=train_also or [], seed=5)
    handle.model.train()
    return handle


def run(
    handle: rw.Handle, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1
) -> list[dict[str, Tensor]]:
    """Trains on a sum over this process's rows; gives what is trained beside, before every merge."""
    before = []
    for step in steps:
        x, y = (part.chunk(world)[rank] for part in batch(step))
        handle.backward(lambda x=x, y=y: (handle.model(x) - y).square().sum())
        optimizer.step()
        before.append({name: tensor.detach().clone() for name, tensor in handle.auxiliary.items()})
        handle.after_step()
        optimizer.zero_grad()
    return before


def state(handle: rw.Handle) -> dict[str, Tensor]:
    found = {f"{site}.{key}": t for site in handle.targets for key, t in handle.parameterization(site).state_dict().items()}
    found |= {f"beside.{name}": tensor for name, tensor in handle.auxiliary.items()}
    found |= {f"update.{site}": handle.update_of(site).dense() for site in handle.targets}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    for reset in (False, True):
        handle = make(1, reset)
        run(handle, handle.optimizer(lr=RATE), range(STEPS), rank, world)
        save_file(state(handle), folder / f"trained-{reset}.{rank}.safetensors")

    handle = make(1, False, ["1"])
    replicas = run(handle, handle.optimizer(lr=RATE), range(4), rank, world)[-1]
    save_file(replicas, folder / f"replicas.{rank}.safetensors")
    save_file(state(handle), folder / f"beside.{rank}.safetensors")

    handle = make(1, False)
    optimizer = handle.optimizer(lr=RATE)
    early = handle.save(folder / f"early-{rank}")
    run(handle, optimizer, range(2), rank, world)
    merged = handle.save(folder / f"merged-{rank}")
    run(handle, optimizer, range(2, 3), rank, world)
    between = handle.save(folder / f"between-{rank}")
    expected = state(handle)
    dist.barrier()
    same = {
        "own, between merges": _equal(state(rw.load_(model(), between)), expected),
        "the other's, right after a merge": _equal(
            state(rw.load_(model(), folder / f"merged-{1 - rank}")), state(rw.load_(model(), merged))
        ),
        "heads, the other's, between merges": _equal(
            _heads(rw.load_(model(), folder / f"between-{1 - rank}")), _heads(rw.load_(model(), merged))
        ),
    }
    try:
        rw.load_(model(), folder / f"early-{1 - rank}")
        refusal = ""
    except RankwiseError as error:
        refusal = f"{type(error).__name__}: {error}"
    assert early.is_dir()
    try:
        make(1, False).optimizer(lr=RATE, per_layer=True)
        per_layer = ""
    except RankwiseError as error:
        per_layer = f"{type(error).__name__}: {error}"
    plain = rw.adapt_(model(), rw.catalog.lora(rank=2), where=["0"])
    try:
        plain.optimizer(lr=RATE, per_layer=True)
        per_layer_plain = ""
    except RankwiseError as error:
        per_layer_plain = f"{type(error).__name__}: {error}"
    said = {"same": same, "early": refusal, "per_layer": per_layer, "per_layer_plain": per_layer_plain}
    (folder / f"said.{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def _heads(handle: rw.Handle) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state(handle).items() if "_heads" in name or name.endswith(".first")}


def _equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
