"""AdamW and SGD are torch's, to rounding."""

import pytest
import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.steps.moments import adamw, sgd


def _run(make, steps=25):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "A": torch.nn.Parameter(torch.randn(3, 7, generator=generator, dtype=torch.float64)),
        "b": torch.nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64)),
    }
    optimizer = make(tensors)
    for _ in range(steps):
        for tensor in tensors.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) + tensor.detach()
        optimizer.step()
    return tensors


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch(weight_decay):
    mine = _run(
        lambda t: BlockOptimizer({"x": t}, [adamw(betas=(0.8, 0.99), weight_decay=weight_decay, decay_vectors=True)], 0.05)
    )
    theirs = _run(lambda t: torch.optim.AdamW(t.values(), lr=0.05, betas=(0.8, 0.99), weight_decay=weight_decay))
    for role in mine:
        torch.testing.assert_close(mine[role], theirs[role], rtol=1e-12, atol=1e-12)


def test_vectors_are_not_decayed_by_default():
    decayed = _run(lambda t: BlockOptimizer({"x": t}, [adamw(weight_decay=0.1)], 0.05))
    plain = _run(lambda t: BlockOptimizer({"x": t}, [adamw()], 0.05))
    assert not torch.equal(decayed["A"], plain["A"])
    # The gradients of the vector depend on the vector alone, so its whole run must be the undecayed one.
    assert torch.equal(decayed["b"], plain["b"])


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_sgd_equals_torch(momentum, weight_decay):
    mine = _run(lambda t: BlockOptimizer({"x": t}, [sgd(momentum=momentum, weight_decay=weight_decay)], 0.05))
    theirs = _run(lambda t: torch.optim.SGD(t.values(), lr=0.05, momentum=momentum, weight_decay=weight_decay))
    for role in mine:
        torch.testing.assert_close(mine[role], theirs[role], rtol=1e-12, atol=1e-12)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="betas in"):
        adamw(betas=(1.0, 0.9))
    with pytest.raises(ArgumentError, match="momentum in"):
        sgd(momentum=-0.1)
