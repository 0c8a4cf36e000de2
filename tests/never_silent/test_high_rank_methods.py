"""The list of silent errors for loha, lokr, hira, gralora, fourierft, c3a, shira and lora_dropout, by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.parameterizations.lora_dropout import KINDS
from tests.never_silent.models import adapted, inputs, mlp

METHODS = [
    "loha(rank=2)",
    "loha(rank=2, start='lycoris')",
    "lokr(rank=2)",
    "lokr(rank=2, zero='D')",
    "hira(rank=2)",
    "gralora(rank=2)",
    "fourierft(frequencies=20)",
    "c3a(block=4)",
    "shira(rank=2)",
    "lora_dropout(rank=2, probability=0.5)",
]


def generic(handle: rankwise.Handle, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize(
    "method", ["c3a(block=4)", "c3a(block=16)", "hira(rank=2)", "lokr(rank=2)", "fourierft(frequencies=20)"]
)
def test_03_every_active_adapter_reads_the_layers_own_input(method: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16)).double()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    base = net(x)
    alone = []
    for seed, name in enumerate(("a", "b")):
        generic(rankwise.adapt_(net, rankwise.compose(method), name=name), seed)
        alone.append(net(x) - base)
    rankwise.activate_(net, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(net(x), base + alone[0] + alone[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_07_the_first_forward_is_the_base_in_training_too(method: str) -> None:
    net = mlp()
    expected = net(inputs())
    rankwise.adapt_(net, rankwise.compose(method))
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(inputs()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("full_scale", "scale"), [("one", 1.0), ("alpha_over_r", 0.01)])
def test_16_the_scale_of_two_whole_factors_is_the_one_that_was_asked_for(full_scale: str, scale: float) -> None:
    net = mlp(1)
    handle = adapted(net, f"lokr(rank=100, alpha=1, full_scale='{full_scale}')")
    block = handle.blocks()["0"]
    assert set(block) == {"C", "D"}
    torch.testing.assert_close(handle.update_of("0").dense(), scale * torch.kron(block["C"], block["D"]))


def test_16_a_factored_one_keeps_alpha_over_r() -> None:
    handle = adapted(mlp(1), "lokr(rank=1, factor=2, alpha=3, full_scale='one')")
    block = handle.blocks()["0"]
    assert set(block) == {"C", "D_B", "D_A"}
    torch.testing.assert_close(handle.update_of("0").dense(), 3 * torch.kron(block["C"], block["D_B"] @ block["D_A"]))


@pytest.mark.parametrize("method", ["lokr(rank=1, factor=2, alpha=5)", "lokr(rank=100, alpha=5)"])
def test_17_forward_merge_and_file_apply_the_scale_once(method: str, tmp_path: Path) -> None:
    net = mlp()
    handle = adapted(net, method)
    expected = net(inputs())
    layer = nn.Linear(8, 8).double()
    layer.load_state_dict({"weight": mlp()[0].weight, "bias": mlp()[0].bias})
    by_hand = inputs() @ (layer.weight + handle.update_of("0").dense()).t() + layer.bias
    torch.testing.assert_close(net[0](inputs()), by_hand)
    handle.save(tmp_path)
    fresh = mlp()
    rankwise.load_(fresh, tmp_path)
    torch.testing.assert_close(fresh(inputs()), expected)
    handle.merge_()
    torch.testing.assert_close(net(inputs()), expected)


def branch(net: nn.Module, plain: Tensor) -> Tensor:
    return (net(inputs()) - plain).detach()


@pytest.mark.parametrize("granularity", ["call", "sample", "token"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", [True, False])
def test_18_the_mean_of_training_is_eval_or_weaker_by_what_was_dropped(kind: str, granularity: str, rescale: bool) -> None:
    if kind in ("input", "output") and granularity != "call":
        return  # refused, see test_every_argument
    net = mlp(1)
    plain = net(inputs())
    text = f"lora_dropout(rank=3, kind='{kind}', probability=0.5, rescale={rescale}, granularity='{granularity}')"
    adapted(net, text)
    expected = branch(net.eval(), plain) * (1.0 if rescale else 0.5)
    net.train()
    draws = torch.stack([branch(net, plain) for _ in range(800)])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5 + 1e-12)
    assert draws.std(0).min() > 0 and error.max() < 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probability", [0.9, 1.0])
def test_19_no_step_is_nan_even_if_everything_drops(kind: str, probability: float) -> None:
    net = nn.Sequential(nn.Linear(4, 4)).double()
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = net(x).detach()
    handle = adapted(net, f"lora_dropout(rank=2, kind='{kind}', probability={probability})")
    for _ in range(300):
        y = net(x)
        assert y.isfinite().all()
        if probability == 1.0:
            torch.testing.assert_close(y, plain, rtol=0, atol=1e-15)
    net(x).square().sum().backward()
    assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in handle.blocks()["0"].values())


@pytest.mark.parametrize("mask", ["random", "structured"])
def test_42_masks_differ_between_layers_and_are_in_the_file(mask: str, tmp_path: Path) -> None:
    net = mlp()
    handle = adapted(net, f"shira(rank=2, mask='{mask}')")
    first, second = (handle.parameterization(site).indices for site in ("0", "1"))
    assert not torch.equal(first, second)
    assert len({tuple(pair) for pair in first.t().tolist()}) == 2 * (8 + 8), "no entry twice"
    handle.save(tmp_path)
    fresh = mlp()
    loaded = rankwise.load_(fresh, tmp_path)
    assert torch.equal(loaded.parameterization("1").indices, second)
    again = rankwise.adapt_(mlp(), rankwise.compose(f"shira(rank=2, mask='{mask}')"))
    assert torch.equal(again.parameterization("0").indices, first), "the same seed and name give the same entries"
    other = rankwise.adapt_(mlp(), rankwise.compose(f"shira(rank=2, mask='{mask}')"), seed=1)
    assert not torch.equal(other.parameterization("0").indices, first)
