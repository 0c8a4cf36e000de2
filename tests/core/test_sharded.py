"""SAM, BAR, AdaLoRA and SoRA on tensors sharded by DTensor give what they give on plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rankwise.core import decisions
from rankwise.core.errors import TrainingError
from rankwise.core.parameterization import Additive
from rankwise.core.sharding import whole
from rankwise.perturbations.balance import Balance
from rankwise.perturbations.sharpness import SharpnessAware
from rankwise.schedules.adalora import AdaLoRA
from rankwise.schedules.sora import SoRA


@pytest.fixture
def mesh() -> Iterator:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


class Gated(Additive):
    """Just the tensors."""

    def __init__(self, tensors: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, tensor)

    @classmethod
    def roles_of(cls, **arguments):
        return frozenset({"A", "B", "gate"})

    def update(self):
        raise AssertionError("steps and decisions do not ask for the update")


def blocks(mesh=None) -> dict[str, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        plain = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return plain if mesh is None else distribute_tensor(plain, mesh, [Shard(0)])

    built = {}
    for site in ("x", "y"):
        built[site] = {role: nn.Parameter(made(*shape)) for role, shape in {"A": (3, 5), "B": (4, 3), "gate": (3,)}.items()}
        for tensor in built[site].values():
            tensor.grad = made(*tensor.shape)
    return built


def run(work, mesh) -> None:
    plain, sharded = blocks(), blocks(mesh)
    work(plain)
    work(sharded)
    for site, block in plain.items():
        for role, tensor in block.items():
            torch.testing.assert_close(whole(sharded[site][role].detach()), tensor.detach(), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(whole(sharded[site][role].grad), tensor.grad, rtol=1e-12, atol=1e-13)


def carried_out(made) -> None:
    for schedule in (AdaLoRA(target_rank=1, total_steps=4), SoRA(threshold=0.1, l1=0.5)):
        for step in range(4):
            schedule.before_step(step, made)
            for site, decision in schedule.decide(step, made, learning_rate=0.1).items():
                entry = Gated(made[site])
                match decision:
                    case decisions.Mask(keep):
                        decisions.mask(entry, keep)
                    case decisions.Assign(values):
                        decisions.assign(entry, values)
            schedule.load_state_dict(schedule.state_dict())
    assert sum(int((whole(block["gate"]) == 0).sum()) for block in made.values()) >= 4


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(mesh, adaptive: bool) -> None:
    run(lambda made: SharpnessAware(rho=0.3, adaptive=adaptive).move(made, learning_rate=1.0), mesh)


@pytest.mark.parametrize("metric", ["none", "weights", "fisher"])
@pytest.mark.parametrize("direction", ["average", "noise"])
def test_relatives_of_sam_and_their_state(mesh, direction: str, metric: str) -> None:
    def work(made) -> None:
        chosen = {"rho": 0.3, "direction": direction, "metric": metric}
        part, again = SharpnessAware(**chosen), SharpnessAware(**chosen)
        for step, current in enumerate((part, part, again, again)):
            if step == 2:
                again.load_state_dict(part.state_dict())  # whole tensors, as a file holds them
            for block in made.values():
                for tensor in block.values():
                    tensor.grad = (tensor.detach() + 0.3 * step).sin()
            current.move(made, learning_rate=1.0)  # and stays there, so that the next gradient is another

    run(work, mesh)


@pytest.mark.parametrize("kind", ["nbar", "obar"])
def test_bar(mesh, kind: str) -> None:
    run(lambda made: Balance(kind=kind).move(made, learning_rate=0.1), mesh)


def test_schedules_and_their_decisions(mesh) -> None:
    run(carried_out, mesh)


def test_cutting_sharded_factors_is_refused(mesh) -> None:
    with pytest.raises(TrainingError, match=r"is sharded .FSDP.; save the adapter"):
        decisions.resize(Gated(blocks(mesh)["x"]), torch.tensor([True, False, True]), None)
