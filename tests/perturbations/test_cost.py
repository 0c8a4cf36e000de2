"""What a perturbation costs, counted on a tiny Llama: products by FLOPs, and everything else by the entries it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise
from rankwise.lab.counters import flops_of
from tests.interop.models import TOKENS, llama

pytest.importorskip("transformers")
ROWS, LENGTH = 4, 32
TWO_PASSES, ONE_PASS = 2.05, 1.02  # forward-backward passes per step


class Written(TorchDispatchMode):
    """Counts the entries of every tensor that an operation makes or overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        self.entries += sum(one.numel() for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, torch.Tensor))
        return made


def operations(text: str) -> int:
    """FLOPs and written entries of the second step (averages have begun), up to the optimizer's own."""
    model = llama()
    handle = rankwise.adapt_(model, rankwise.compose(text))
    optimizer = handle.optimizer(lr=1e-3)
    ids = torch.randint(0, TOKENS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def step() -> None:
        run()
        handle.after_backward(run)

    step()
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()
    with Written() as written:
        products = flops_of(step)
    return products + written.entries


@pytest.fixture(scope="module")
def plain() -> int:
    return operations("lora(rank=4)")


@pytest.mark.parametrize(
    "text", ["sam", "sam(adaptive=True)", "vasso", "infosam", "presam(direction='noise', metric='fisher')"]
)
def test_two_passes_cost_two_passes(text: str, plain: int) -> None:
    ratio = operations(f"lora(rank=4) + {text}") / plain
    print(f"{text}: {ratio:.4f} passes")
    assert 1.9 < ratio <= TWO_PASSES


@pytest.mark.parametrize("text", ["bar", "bar(kind='obar')"])
def test_bar_costs_one(text: str, plain: int) -> None:
    ratio = operations(f"lora(rank=4) + {text}") / plain
    print(f"{text}: {ratio:.4f} passes")
    assert 1.0 < ratio <= ONE_PASS
