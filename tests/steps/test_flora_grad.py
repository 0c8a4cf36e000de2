"""Flora: the compressed momentum, its transfers, and the compressed accumulation."""

import math

import pytest
import torch

import rankwise
from rankwise.core.errors import ArgumentError, TrainingError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.steps.flora_grad import CompressedAccumulation, flora_grad
from rankwise.steps.moments import sgd
from rankwise.steps.random_projection import derived_seed, projection_of


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fed(step, gradients, W=None):
    """The directions of a step for a sequence of gradients, and its last state."""
    block = {"weight": torch.zeros_like(gradients[0]) if W is None else W}
    state = step.init(block)
    return [step.update({"weight": G}, state, block)["weight"].clone() for G in gradients], state["weight"]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_whole_recursion_by_hand(shape):
    gradients = [normal(*shape, seed=seed) for seed in range(7)]
    found, kept = fed(flora_grad(rank=3, interval=2, momentum=0.8, base="sgd", clip=math.inf, seed=5), gradients)
    drawn = [
        projection_of(*shape, 3, derived_seed(5, "flora_grad", ".weight", k), device="cpu", dtype=torch.float64)
        for k in range(4)
    ]
    C, R, window = torch.zeros_like(kept["inner.exp_avg"]), drawn[0], 0
    for count, (G, direction) in enumerate(zip(gradients, found, strict=True), start=1):
        torch.testing.assert_close(direction, 0.2 * G + 0.8 * R.up(C))
        if count % 2 == 0:
            window += 1
            C, R = drawn[window].down(R.up(C)), drawn[window]
        C = 0.8 * C + 0.2 * R.down(G)
    torch.testing.assert_close(kept["inner.exp_avg"], C)
    assert set(kept) == {"step", "inner.exp_avg"}  # no R


def test_state_is_the_formula_and_in_single_precision():
    _, kept = fed(flora_grad(rank=3), [normal(6, 9, dtype=torch.bfloat16)])
    assert {key: tuple(value.shape) for key, value in kept.items()} == {
        "step": (),
        "inner.exp_avg": (3, 9),
        "exp_avg_sq_row": (6,),
        "exp_avg_sq_col": (9,),
    }
    assert all(value.dtype == torch.float32 for value in kept.values())


def test_without_momentum_it_is_the_base_step():
    gradients = [normal(6, 9, seed=seed) for seed in range(5)]
    found, _ = fed(flora_grad(rank=2, momentum=0.0, base="sgd", clip=math.inf), gradients)
    expected, _ = fed(sgd(), gradients)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_step_is_clipped_and_relative_to_the_weight_if_asked():
    G, W = normal(6, 9), 3.0 * normal(6, 9, seed=1)
    (plain,), _ = fed(flora_grad(rank=2, momentum=0.0, clip=math.inf), [G], W)
    (held,), _ = fed(flora_grad(rank=2, momentum=0.0, clip=0.25), [G], W)
    (relative,), _ = fed(flora_grad(rank=2, momentum=0.0, clip=0.25, scale_parameter=True), [G], W)
    (decayed,), _ = fed(flora_grad(rank=2, momentum=0.0, clip=0.25, weight_decay=0.1), [G], W)
    size = plain.square().mean().sqrt()
    torch.testing.assert_close(held, plain * 0.25 / size)
    torch.testing.assert_close(relative, held * W.square().mean().sqrt())
    torch.testing.assert_close(decayed, held + 0.1 * W)


def test_transfer_is_right_in_the_mean():
    # One gradient, then silence: what is remembered after the transfer stands for what was remembered before.
    G, zero = normal(8, 10), torch.zeros(8, 10, dtype=torch.float64)
    seen = []
    for seed in range(3000):
        step = flora_grad(rank=4, interval=2, momentum=0.5, base="sgd", clip=math.inf, seed=seed)
        (_, before, after), _ = fed(step, [G, zero, zero])
        seen.append(torch.stack([before, after]))
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(mean[0], 0.25 * G, rtol=0.0, atol=0.04)
    torch.testing.assert_close(mean[1], 0.125 * G, rtol=0.0, atol=0.06)


def test_sites_have_their_own_projections_and_updates_are_of_full_rank():
    layers = [torch.nn.Linear(8, 8, bias=False).double() for _ in range(2)]
    with torch.no_grad():
        layers[1].weight.copy_(layers[0].weight)
    model = torch.nn.ModuleList(layers)
    handle = rankwise.adapt_(model, rankwise.compose("full + flora_grad(rank=2, interval=2, base='sgd')"))
    optimizer = handle.optimizer(lr=0.1)
    G = normal(8, 8)
    for _ in range(8):
        for block in handle.blocks().values():
            block["weight"].grad = G.clone()
        optimizer.step()
    one, two = (layer.adapter["default"].weight.detach() for layer in layers)
    assert not torch.allclose(one, two)
    assert torch.linalg.matrix_rank(handle.update_of("0").dense()) == 8


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_accumulation_is_linear_and_frees_every_gradient(shape):
    weight, bias = torch.nn.Parameter(normal(*shape)), torch.nn.Parameter(normal(shape[0]))
    accumulation = CompressedAccumulation([weight, bias], rank=3, seed=1)
    total = torch.zeros(shape, dtype=torch.float64)
    for seed in range(4):
        x = normal(7, shape[1], seed=seed)
        loss = (x @ weight.mT + bias).square().sum()
        expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        total += expected
        loss.backward()
        assert weight.grad is None and bias.grad is None
    assert sum(kept.numel() for kept in accumulation._sums.values()) == 3 * 9 + shape[0]
    accumulation.decompress()
    R = projection_of(*shape, 3, derived_seed(1, "accumulation", 0, 0), device="cpu", dtype=torch.float64)
    torch.testing.assert_close(weight.grad, R.up(R.down(total)) / 4)
    assert bias.grad is not None
    first = weight.grad.clone()
    weight.grad = total / 4
    bias.grad = None
    accumulation.accumulate()
    accumulation.decompress()
    assert not torch.allclose(weight.grad, first)  # another R for the next step
    accumulation.remove()
    (weight.sum() * 2).backward()
    assert weight.grad is not None


def test_accumulated_gradients_train():
    weight = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    target, x = normal(6, 8), normal(40, 8, seed=1)
    accumulation = CompressedAccumulation([weight], rank=4)
    optimizer = BlockOptimizer({"site": {"weight": weight}}, [sgd()], 0.1)
    for _ in range(300):
        for part in x.chunk(2):
            (part @ (weight - target).mT).square().sum().div(2 * len(part)).backward()
        accumulation.decompress()
        optimizer.step()
    assert float((weight.detach() - target).norm() / target.norm()) < 1e-3


def test_bad_arguments():
    for make, text in (
        (lambda: flora_grad(base="adam"), "base is one of adafactor, sgd"),
        (lambda: flora_grad(rank=0), "rank >= 1"),
        (lambda: flora_grad(decay_rate=0.1), "decay_rate < 0"),
        (lambda: flora_grad(base="sgd", decay_rate=-0.5), "leave it out with base='sgd'"),
        (lambda: CompressedAccumulation([], rank=2), "needs trained tensors"),
    ):
        with pytest.raises(ArgumentError, match=text):
            make()
    with pytest.raises(ArgumentError, match="rank=4 is larger than a weight of 3 × 8"):
        flora_grad(rank=4).init({"weight": torch.zeros(3, 8)})
    with pytest.raises(TrainingError, match="no gradient to decompress"):
        CompressedAccumulation([torch.nn.Parameter(torch.zeros(3, 8))], rank=2).decompress()
