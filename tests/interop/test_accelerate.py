"""The optimizer under accelerate in one process, with a scheduler and accumulated gradients: the weights are those by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")  # accelerate warns about itself

STEPS, MICRO, RATE, ROWS = 4, 2, 0.05, 3
RECIPES = {
    "step with clipping": "lora(rank=2) + theory_gradient_clipping(max_norm=0.1)",
    "clipping of the effective step": "lora(rank=2) + theory_gradient_clipping(max_norm=0.1, mode='effective') + scaled_gd",
    "projection": "full + galore(rank=2, refresh=2)",
    "perturbation": "lora(rank=2) + bar(kind='obar')",
    "two passes": "lora(rank=2, dropout=0.2) + sam(rho=0.1)",
    "restarts": "cola(rank=3, interval=2, ranks=(2, 1))",
    "renewals": "lte(rank=2, heads=1, alpha=4.0, interval=2)",
    "other tensors": "cuttlefish(interval=1, window=2, threshold=100.0, rule='plain') + sgd(momentum=0.9)",
}


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    sizes = ((ROWS, 9), (ROWS, 6))
    return [tuple(torch.randn(*size, generator=generator).double() for size in sizes) for _ in range(MICRO)]  # type: ignore[misc]


def adapted(text: str) -> rw.Handle:
    handle = rw.adapt_(model(), rw.compose(text), seed=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator).double() * 0.1)
    return handle


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1.0 / (1 + count))


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (net(x) - y).square().mean()


def by_hand(handle: rw.Handle) -> None:
    optimizer = handle.optimizer(lr=RATE)
    scheduler = scheduler_of(optimizer)
    handle.model.train()
    for step in range(STEPS):

        def backward(step: int = step) -> None:
            for batch in micro_batches(step):
                (loss_of(handle.model, batch) / MICRO).backward()

        backward()
        handle.after_backward(backward)
        optimizer.step()
        handle.after_step()
        scheduler.step()
        optimizer.zero_grad()


def under_accelerate(handle: rw.Handle) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    optimizer = handle.optimizer(lr=RATE)
    net, optimizer, scheduler = accelerator.prepare(handle.model, optimizer, scheduler_of(optimizer))
    net.train()
    for step in range(STEPS):

        def again(step: int = step) -> None:
            for batch in micro_batches(step):
                accelerator.backward(loss_of(net, batch))

        for batch in micro_batches(step):
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, batch))
                if accelerator.sync_gradients:
                    handle.after_backward(again)
                optimizer.step()
                if accelerator.sync_gradients:
                    handle.after_step()
                scheduler.step()
                optimizer.zero_grad()


def tensors(handle: rw.Handle) -> Iterator[tuple[str, Tensor]]:
    for site, block in handle.blocks().items():
        yield f"update of {site}", handle.update_of(site).dense().detach()
        yield from ((f"{site}.{role}", tensor.detach()) for role, tensor in block.items())


@pytest.mark.parametrize("kind", RECIPES)
def test_prepared_by_accelerate_it_gives_the_same_weights(kind: str) -> None:
    one, two = adapted(RECIPES[kind]), adapted(RECIPES[kind])
    start = dict(tensors(one))
    by_hand(one)
    under_accelerate(two)
    expected, found = dict(tensors(one)), dict(tensors(two))
    assert expected.keys() == found.keys()
    assert one.step_count == two.step_count == STEPS
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        if name.startswith("update"):
            assert float((tensor - start[name]).abs().max()) > 1e-3
