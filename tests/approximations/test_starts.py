import contextlib
import copy

import pytest
import torch
from torch import nn

import rankwise
from rankwise.approximations.budget import ExplainedVariance, redistribute
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.piece import Piece
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import LayerStatistics, MomentCollector, Statistic

EVERY = {
    "pissa": {},
    "lora_one": {},
    "nystrom_nora": {},
    "eva": {},
    "lora_sb": {"learning_rate": 0.01},
    "olora": {},
    "milora": {},
    "orthogonal_start": {},
    "corda": {"select": "smallest"},
    "loftq": {"bits": 2, "block": 16},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, stride=2)
        self.hidden = nn.Linear(8 * 4, 10)
        self.last = nn.Linear(10, 4, bias=False)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.grouped(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.hidden(h.flatten(1))))


def batches(count=3):
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, 2, 6, 6, generator=g, dtype=torch.float64), torch.randint(4, (6,), generator=g)) for _ in range(count)
    ]


def recipe_of(name, **arguments):
    """The start on plain LoRA, whatever its default parameterization."""
    if name == "lora_sb":
        start = Piece("start", "LoRASB", arguments)
        return rankwise.compose("lora(rank=3, alpha=6)", start=start)
    return rankwise.compose(rankwise.catalog.lora(rank=3, alpha=6), make(name, **arguments))


def make(name, **arguments):
    return getattr(rankwise.catalog, name)(rank=3, **arguments)


def adapted(recipe, seed=0):
    net = Net()
    before = copy.deepcopy(net)
    statistics = rankwise.collect(net, batches(), recipe.needs, "all-layers")
    return net, before, statistics, rankwise.adapt_(net, recipe, "all-layers", statistics, seed=seed)


@pytest.mark.parametrize("name", EVERY)
def test_every_start_on_linear_and_convolutions(name):
    net, before, _statistics, handle = adapted(recipe_of(name, **EVERY[name]))
    x = batches()[0][0]
    assert set(handle.targets) == {"first", "grouped", "hidden", "last"}
    if name in ("nystrom_nora", "eva"):
        assert torch.equal(net(x), before(x))
    elif name == "loftq":
        assert (net(x) - before(x)).abs().max() > 1e-6
    elif not recipe_of(name, **EVERY[name]).start.build().shifted:
        torch.testing.assert_close(net(x), before(x), rtol=0, atol=1e-12)
    else:
        assert (net(x) - before(x)).abs().max() > 1e-6
        loss = sum(nn.functional.cross_entropy(net(x), y) for x, y in batches())
        assert loss < sum(nn.functional.cross_entropy(before(x), y) for x, y in batches())
    for site, block in handle.blocks().items():
        assert set(block) == {"A", "B"}, site
    optimizer = handle.optimizer(lr=1e-2)
    first = None
    for _ in range(15):
        loss = sum(nn.functional.cross_entropy(net(x), y) for x, y in batches())
        first = first or loss.item()
        loss.backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert loss.item() < 0.9 * first
    handle.detach_()
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[key]), key


@pytest.mark.parametrize("name", [*EVERY, "absorb"])
def test_saved_starts_come_back(name, tmp_path):
    recipe = recipe_of("pissa", mode="absorb") if name == "absorb" else recipe_of(name, **EVERY[name])
    net, before, _, handle = adapted(recipe)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(0.01)
    x = batches()[0][0]
    want = net(x)
    handle.save(tmp_path / "a")
    fresh = copy.deepcopy(before)
    loaded = rankwise.load_(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(x), want, rtol=0, atol=1e-13)
    loaded.detach_()
    assert all(torch.equal(t, before.state_dict()[k]) for k, t in fresh.state_dict().items())


@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_pissa_is_exported_at_twice_the_rank(mode):
    net, before, _, handle = adapted(recipe_of("pissa", mode=mode))
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.mul_(1.1)
    for site, target in handle.targets.items():
        factors = handle.low_rank_of(site)
        assert factors.rank == 6
        untouched = target.layout.to_matrix(before.get_submodule(site).weight)
        s, entry = 2.0, handle.parameterization(site)
        U, S, Vh = torch.linalg.svd(untouched, full_matrices=False)
        residual = U[:, 3:] * S[3:] @ Vh[3:]
        torch.testing.assert_close(factors.dense(), residual + s * entry.B @ entry.A - untouched)
        torch.testing.assert_close(handle.update_of(site).dense(), factors.dense())
    handle.merge_()
    handle.unmerge_()
    handle.detach_()
    assert all(torch.equal(t, before.state_dict()[k]) for k, t in net.state_dict().items())


@pytest.mark.parametrize("mode", ["offset", "absorb"])
def test_pissa_on_half_precision_starts_from_the_stored_factors(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 12)).to(torch.bfloat16)
    before = copy.deepcopy(net)
    said = pytest.warns(UserWarning, match="rounds to bfloat16") if mode == "absorb" else contextlib.nullcontext()
    with said:
        handle = rankwise.adapt_(net, rankwise.catalog.pissa(rank=4, mode=mode))
    B = handle.parameterization("0").B
    assert B.dtype is torch.float32
    _U, S, _Vh = torch.linalg.svd(before[0].weight.float(), full_matrices=False)
    torch.testing.assert_close(B.norm(dim=0), S[:4].sqrt())
    moved = (net[0].weight.float() + (B @ handle.parameterization("0").A if mode == "absorb" else 0)) - before[0].weight.float()
    assert moved.abs().max() <= before[0].weight.float().abs().max() * 2**-8  # one rounding to bfloat16
    handle.detach_()
    assert torch.equal(net[0].weight, before[0].weight)


def test_gradients_are_streamed_one_layer_at_a_time():
    net, alive = Net(), []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in net.parameters())))
    statistics = rankwise.collect(net, batches(), {Statistic.GRADIENT}, "all-layers")
    assert len(alive) == 4 * 3
    assert max(alive) == 1
    want = [torch.zeros_like(p) for p in net.parameters()]
    for x, y in batches():
        parts = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        want = [old + part / 3 for old, part in zip(want, parts, strict=True)]
    named = dict(zip([name for name, _ in net.named_parameters()], want, strict=True))
    for site, known in statistics.items():
        torch.testing.assert_close(known.gradient, named[f"{site}.weight"].reshape(known.gradient.shape))


@pytest.mark.parametrize("name", ["LoRAOne", "LoRASB"])
def test_a_dead_layer_falls_back_with_a_warning(name):
    known = LayerStatistics("deep.layer", torch.ones(5, 4), gradient=torch.zeros(5, 4))
    start = Piece("start", name).build()
    with pytest.warns(UserWarning, match=r"deep\.layer: the probe gradient is zero"):
        factors = start(known, 2, generator=torch.Generator().manual_seed(0))
    assert not factors.B.any()
    assert factors.A.abs().min() > 0


def test_lora_sb_defaults_to_the_small_core():
    _net, _before, statistics, handle = adapted(make("lora_sb", learning_rate=0.01))
    for site in handle.targets:
        U, S, Vh = torch.linalg.svd(-0.01 * statistics[site].gradient.sign(), full_matrices=False)
        torch.testing.assert_close(handle.update_of(site).dense(), U[:, :3] * S[:3] @ Vh[:3])
        assert set(handle.blocks()[site]) == {"R"}


def test_compensated_lora_sb_starts_at_the_base():
    net, before, _, _ = adapted(recipe_of("lora_sb", learning_rate=0.01, compensate=True))
    torch.testing.assert_close(net(batches()[0][0]), before(batches()[0][0]), rtol=0, atol=1e-12)


def test_eva_says_when_the_inputs_have_too_few_directions():
    moments = MomentCollector(5)
    moments.add(
        torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 6.0) + 3
    )
    known = LayerStatistics("x", torch.zeros(4, 5, dtype=torch.float64), inputs=moments)
    eva = Piece("start", "EVA").build()
    assert eva(known, 1, generator=torch.Generator()).A.shape == (1, 5)
    with pytest.raises(StatisticsError, match="vary in only 1 of 5"):
        eva(known, 2, generator=torch.Generator())


def test_budget_gives_the_total_exactly_and_never_more_than_its_limit():
    spiked = torch.tensor([1.0] + [0.0] * 7)
    flat = torch.full((8,), 1 / 8)
    assert ExplainedVariance(rho=2)({"a": spiked, "b": flat}, 8) == {"a": 1, "b": 7}
    assert ExplainedVariance(rho=1)({"a": spiked, "b": flat}, 8) == {"a": 4, "b": 4}
    assert ExplainedVariance(rho=2, minimum=2)({"a": spiked, "b": flat}, 8) == {"a": 2, "b": 6}
    with pytest.raises(ArgumentError, match="can hold 0 to 11 ranks"):
        ExplainedVariance(rho=2)({"a": flat[:3], "b": flat}, 12)


def test_redistributed_ranks_keep_every_scale_and_train(tmp_path):
    net = Net()
    recipe = rankwise.catalog.eva(rank=3, alpha=6)
    statistics = rankwise.collect(net, batches(), recipe.needs, "all-layers")
    moved = redistribute(recipe, statistics)
    assert sum(moved.ranks.values()) == 12
    assert len(set(moved.ranks.values())) > 1
    assert min(moved.ranks.values()) >= 1 and max(moved.ranks.values()) <= 6
    handle = rankwise.adapt_(net, moved, "all-layers", statistics)
    for site in handle.targets:
        entry = handle.parameterization(site)
        assert entry.A.shape[0] == moved.ranks[site]
        assert entry.scale == 2.0
    handle.save(tmp_path)
    assert rankwise.load_(Net(), tmp_path).recipe.ranks == moved.ranks
    assert set(redistribute(recipe, statistics, rho=1).ranks.values()) == {3}


def test_redistribution_refuses_to_drop_layers_unseen():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8, generator=g, dtype=torch.float64)
    known = {}
    for name, live in {"two": 2, "eight": 8}.items():
        moments = MomentCollector(8)
        moments.add(rows * (torch.arange(8) < live))
        known[name] = LayerStatistics(name, torch.zeros(8, 8, dtype=torch.float64), inputs=moments)
    recipe = rankwise.catalog.eva(rank=1)
    assert redistribute(recipe, known).ranks == {"two": 1, "eight": 1}
    with pytest.raises(ArgumentError, match=r"1 of 2 layers got no rank \(eight\)"):
        redistribute(recipe, known, minimum=0)
    with pytest.raises(ArgumentError, match="Full has no argument rank, alpha, scale"):
        redistribute(Recipe(name="x", parameterization=Piece("parameterization", "Full")), known)
