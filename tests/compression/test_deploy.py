"""Chains of small layers, and adapters that become them."""

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.compression import deploy_, slow_layers
from rankwise.compression.chains import channel_chain, filter_chain, spatial_chain, tucker_chain
from rankwise.core.errors import ArgumentError, MergeError, TargetError
from rankwise.core.targets import target_of
from rankwise.procedures.matricize import KINDS, fold, unfold


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GEOMETRIES = [
    {"stride": 1, "padding": 1},
    {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2)},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": (1, 0), "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "groups": 2, "bias": False},
]


def conv(kernel: tuple[int, ...] = (3, 2), **geometry: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1](4, 6, kernel, **geometry).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chains_at_full_rank_are_the_layer(geometry: dict[str, object]) -> None:
    layer, x = conv(**geometry), drawn(2, 4, 9, 8)
    target, groups = target_of("", layer), layer.groups
    assert target is not None
    U, S, Vh = torch.linalg.svd(target.matrix(), full_matrices=False)
    width = min(4 // groups * 3, 6 // groups * 2)
    chains = [channel_chain(layer, U * S, Vh), spatial_chain(layer, width), filter_chain(layer, min(4 // groups, 6))]
    for chain in chains:
        torch.testing.assert_close(chain(x), layer(x), rtol=1e-12, atol=1e-12)
        assert all(part.bias is None for part in list(chain)[:-1] if isinstance(part, nn.Conv2d))


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)])
def test_chains_of_a_kernel_of_low_rank_are_exact_at_that_rank(kernel: tuple[int, ...]) -> None:
    layer, x = conv(kernel, stride=2, padding=1), drawn(2, 4, *(7 for _ in kernel))
    shape = layer.weight.shape
    for kind, make in (("spatial", spatial_chain), ("filter", filter_chain)):
        matrix = unfold(layer.weight.detach(), kind)
        left, right = drawn(*matrix.shape[:-1], 2), drawn(*matrix.shape[:-2], 2, matrix.shape[-1], seed=1)
        with torch.no_grad():
            layer.weight.copy_(fold(left @ right, kind, shape))
        torch.testing.assert_close(make(layer, 2)(x), layer(x), rtol=1e-11, atol=1e-11)
        assert not torch.allclose(make(layer, 1)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2, 2)])
def test_folding_undoes_unfolding_to_the_bit(kind: str, shape: tuple[int, ...]) -> None:
    kernel = drawn(*shape)
    assert torch.equal(fold(unfold(kernel, kind), kind, shape), kernel)


@pytest.mark.parametrize("linear", [True, False])
def test_a_tucker_chain(linear: bool) -> None:
    layer = nn.Linear(4, 6).double() if linear else conv(stride=2, padding=1)
    core, U_out, U_in = drawn(3, 2, *layer.weight.shape[2:]), drawn(6, 3, seed=1), drawn(4, 2, seed=2)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("ab...,oa,ib->oi...", core, U_out, U_in))
    x = drawn(3, 4) if linear else drawn(2, 4, 7, 7)
    chain = tucker_chain(layer, core, U_out, U_in)
    torch.testing.assert_close(chain(x), layer(x), rtol=1e-12, atol=1e-12)
    assert len(chain) == 3 and sum(p.numel() for p in chain.parameters()) == core.numel() + 18 + 8 + 6


def test_what_has_no_chain_is_refused() -> None:
    with pytest.raises(TargetError, match="no kernel"):
        filter_chain(nn.Linear(3, 4), 1)
    with pytest.raises(TargetError, match="groups=1, this layer has 2"):
        tucker_chain(conv(groups=2), drawn(3, 2, 3, 2), drawn(6, 3), drawn(2, 2))
    with pytest.raises(TargetError, match="LayerNorm is no layer"):
        channel_chain(nn.LayerNorm(3), drawn(3, 1), drawn(1, 3))
    with pytest.raises(ArgumentError, match="ranks 1 to 12"):
        spatial_chain(conv(), 13)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1)
            self.grouped = nn.Conv2d(12, 8, 3, groups=2, padding=1, bias=False)
            self.hidden, self.last = nn.Linear(72, 20), nn.Linear(20, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.grouped(torch.tanh(self.conv(x)))).flatten(1)
        return self.last(torch.tanh(self.hidden(h)))


def trained(text: str, steps: int, where: object = "all-layers", dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    net, x, y = Net(dtype), drawn(6, 3, 6, 6).to(dtype), drawn(6, 4, seed=1).to(dtype)
    handle = rankwise.adapt_(net, rankwise.compose(text), where)  # type: ignore[arg-type]
    optimizer = handle.optimizer(lr=0.01)
    for _ in range(steps):
        handle.backward(lambda: (net(x) - y).square().mean())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return net, handle, x


RECIPES = {
    "trp(interval=4, fraction=0.2)": "channel",
    "trp(interval=4, fraction=0.2, matricization='spatial')": "spatial",
    "trp(interval=4, fraction=0.2, matricization='filter')": "filter",
    "cuttlefish(interval=1, window=3, threshold=100.0, rule='plain')": "channel",
    "maestro(interval=2, penalty=1e-3, threshold=2.5)": "channel",
    "dlrt(rank=2, max_rank=4)": "channel",
    "condlr(rank=2)": "channel",
    "tucker_dlrt(ranks=2, max_rank=2)": "tucker",
}


@pytest.mark.parametrize("text", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_trained_network_becomes_smaller_and_gives_the_same(text: str, dtype: torch.dtype) -> None:
    net, handle, x = trained(text, 4, dtype=dtype)
    with torch.no_grad():
        expected = net.eval()(x)
        net.train()
        report = deploy_(handle)
        assert all(module.training for module in net.modules())
        tolerance = 1e-10 if dtype is torch.float64 else 1e-5
        torch.testing.assert_close(net.eval()(x), expected, rtol=tolerance, atol=tolerance)
    assert not any(".adapter" in name for name, _ in net.named_modules())
    forms = {layer.site: layer.form for layer in report.layers}
    assert forms["hidden"] == "channel" and (RECIPES[text] in (forms["conv"], forms["grouped"]))
    weights = sum(p.numel() for p in net.parameters()) - (12 + 20 + 4)
    assert report.numbers_after == weights < report.numbers_before == 3 * 12 * 9 + 6 * 8 * 9 + 72 * 20 + 20 * 4
    assert "hidden" in str(report)


@pytest.mark.parametrize("text", ["lora(rank=2)", "dora(rank=2)", "full", "ia3", "hra(rank=2)"])
def test_what_is_not_of_low_rank_becomes_one_layer(text: str) -> None:
    net, handle, x = trained(text, 3, where="all-linear")
    with torch.no_grad():
        expected = net.eval()(x)
        report = deploy_(handle)
        torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    assert {layer.form for layer in report.layers} == {"dense"} and isinstance(net.hidden, nn.Linear)
    assert report.numbers_after == report.numbers_before


def test_a_criterion_leaves_out_what_is_small() -> None:
    _, handle, _ = trained("trp(interval=100)", 3)
    report = deploy_(handle, energy=0.5)
    assert report.numbers_after < 0.5 * report.numbers_before
    _, handle, _ = trained("trp(interval=100)", 3)
    weight = handle.blocks()["hidden"]["weight"].detach().clone()
    report = deploy_(handle, threshold=1.0)
    kept = int((torch.linalg.svdvals(weight) >= 1.0).sum())
    assert {layer.site: layer.rank for layer in report.layers}["hidden"] == kept


def test_a_merged_adapter_and_a_rank_of_none_are_met() -> None:
    net, handle, x = trained("maestro(interval=2, penalty=1e-3, threshold=1e9)", 4)
    assert handle.parameterization("conv").rank == 0
    handle.merge_()
    with torch.no_grad():
        expected = net.eval()(x)
        report = deploy_(handle)
        torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert {layer.rank for layer in report.layers} == {0}
    assert isinstance(net.conv, nn.Sequential)


def test_refusals() -> None:
    net, handle, _ = trained("full", 1)
    rankwise.adapt_(net, rankwise.compose("lora(rank=2)"), ["hidden"], name="other")
    with pytest.raises(MergeError, match="adapters other are on these layers too"):
        deploy_(handle)
    net, handle, _ = trained("full", 1)
    with pytest.raises(ArgumentError, match="one of energy"):
        deploy_(handle, energy=0.5, fraction=0.5)
    with pytest.raises(ArgumentError, match="matricization is one of"):
        deploy_(handle, matricization="rows")


def test_slow_layers_are_those_that_get_faster() -> None:
    net, x = nn.Sequential(nn.Linear(1024, 1024)), drawn(256, 1024).float()
    assert slow_layers(net, x, ratio=0.02) == ["0"]  # a twenty-fifth of the work
    assert slow_layers(net, (x, None), ratio=1.0) == []  # twice the work
    with pytest.raises(ArgumentError, match="ratio"):
        slow_layers(net, x, ratio=0.0)
