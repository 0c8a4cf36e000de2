"""IterIS on real modules: fixed points, optimality, convergence along a chain, and its independence of what is on the model."""

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.core.errors import ArgumentError, MergeError, TargetError
from rankwise.core.operators import Dense, LowRank
from rankwise.merging import iteris

D = torch.float64


def gen(seed):
    return torch.Generator().manual_seed(seed)


class Chain(nn.Module):
    def __init__(self, depth=4, width=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width).double() for _ in range(depth))
        for i, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=gen(100 + i), dtype=D) * 0.4

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adapter(seed, sites, width=6, r=2, size=0.3):
    return {
        site: LowRank(
            torch.randn(width, r, generator=gen(seed + i), dtype=D) * size,
            torch.randn(r, width, generator=gen(seed + 50 + i), dtype=D),
            1.5,
        )
        for i, site in enumerate(sites)
    }


ALL = [f"layers.{i}" for i in range(4)]


def data(seed, tokens=20, batches=2, width=6):
    return [torch.randn(tokens, width, generator=gen(seed + i), dtype=D) for i in range(batches)]


@pytest.mark.parametrize("weight", ["full", "delta", "none"])
def test_one_adapter_comes_back_as_it_is(weight):
    only = adapter(0, ALL)
    result = iteris(Chain(), [only], [data(0)], weight=weight, alpha=1e-3, max_iterations=1)
    for site in ALL:
        torch.testing.assert_close(result[site].dense(), only[site].dense(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("weight", ["full", "delta", "none"])
def test_the_solution_is_the_weighted_least_squares_one_written_by_hand(weight):
    """One solve against the definition: explicit features, explicit weights, torch's own least squares."""
    net, adapters, tasks = Chain(1), [adapter(0, ["layers.0"]), adapter(9, ["layers.0"])], [data(0), data(7)]
    result = iteris(net, adapters, tasks, [1.0, 2.0], alpha=0.0, weight=weight, max_iterations=1)
    net.requires_grad_(False)
    rows, targets = [], []
    for user, one, batches in zip([1.0, 2.0], adapters, tasks, strict=True):
        X, delta = torch.cat(batches), one["layers.0"].dense()
        F = {"full": net.layers[0].weight + delta, "delta": delta, "none": None}[weight]
        balance = user * (1.0 if F is None else float(F.square().sum() / (X @ F.t()).square().sum()))
        rows.append(X * balance**0.5)
        targets.append(X @ delta.t() * balance**0.5)
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.t()
    torch.testing.assert_close(result["layers.0"].dense(), expected, rtol=0, atol=1e-9)
    assert result.rank("layers.0") == 4


def test_later_solves_use_inputs_of_the_merged_model():
    """The second layer's second solve against a regression with explicitly measured features."""
    net, adapters, tasks = Chain(2), [adapter(0, ALL[:2]), adapter(9, ALL[:2])], [data(0), data(7)]
    net.requires_grad_(False)
    first = iteris(net, adapters, tasks, alpha=0.0, weight="none", max_iterations=1)["layers.0"].dense()
    result = iteris(net, adapters, tasks, alpha=0.0, weight="none", max_iterations=2)
    rows, targets = [], []
    for one, batches in zip(adapters, tasks, strict=True):
        X = torch.cat(batches)

        def hidden(delta, X=X):
            return torch.tanh(X @ (net.layers[0].weight + delta).t() + net.layers[0].bias)

        rows.append(hidden(first))
        targets.append(hidden(one["layers.0"].dense()) @ one["layers.1"].dense().t())
    expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.t()
    torch.testing.assert_close(result["layers.1"].dense(), expected, rtol=0, atol=1e-8)


def test_a_chain_is_final_after_as_many_solves_as_layers_and_stops_there():
    adapters, tasks = [adapter(0, ALL), adapter(9, ALL)], [data(0), data(7)]
    four = iteris(Chain(), adapters, tasks, alpha=0.0, max_iterations=4)
    many = iteris(Chain(), adapters, tasks, alpha=0.0, max_iterations=9)
    three = iteris(Chain(), adapters, tasks, alpha=0.0, max_iterations=3)
    assert all(torch.equal(four[site].dense(), many[site].dense()) for site in ALL)
    assert many.facts["iterations"] == 5 and many.facts["relative change per solve"][-1] == 0.0
    assert torch.equal(three[ALL[2]].dense(), four[ALL[2]].dense())
    assert not torch.equal(three[ALL[3]].dense(), four[ALL[3]].dense())


def test_padding_is_dropped_unless_asked_for():
    net, adapters = Chain(1), [adapter(0, ["layers.0"]), adapter(9, ["layers.0"])]
    x = torch.randn(4, 8, 6, generator=gen(3), dtype=D)
    mask = (torch.arange(8) < 5).long().expand(4, 8)
    padded = [[{"x": x, "attention_mask": mask}], [{"x": x + 1, "attention_mask": mask}]]
    cut = [[{"x": x[:, :5]}], [{"x": x[:, :5] + 1}]]
    site = "layers.0"
    assert torch.allclose(iteris(net, adapters, padded)[site].dense(), iteris(net, adapters, cut)[site].dense(), atol=1e-10)
    assert not torch.allclose(iteris(net, adapters, padded, mask=False)[site].dense(), iteris(net, adapters, cut)[site].dense())


def test_the_model_is_untouched_and_its_own_adapters_do_not_act():
    net, adapters, tasks = Chain(2), [adapter(0, ALL[:2]), adapter(9, ALL[:2])], [data(0), data(7)]
    plain = iteris(net, adapters, tasks)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    handle = rw.adapt_(net, rw.catalog.lora(rank=2))
    with torch.no_grad():
        for block in handle.blocks().values():
            block["B"].fill_(0.5)
    net.train()
    again = iteris(net, adapters, tasks)
    assert net.training and all(torch.equal(plain[s].dense(), again[s].dense()) for s in ALL[:2])
    handle.merge_()
    with pytest.raises(MergeError, match="unmerge_"):
        iteris(net, adapters, tasks)
    handle.detach_()
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())


def test_dense_updates_are_solved_densely_and_agree_with_the_factored_route():
    net, tasks = Chain(2), [data(0), data(7)]
    adapters = [adapter(0, ALL[:2]), adapter(9, ALL[:2])]
    dense = [adapters[0], {site: Dense(update.dense()) for site, update in adapters[1].items()}]
    for site in ALL[:2]:
        one, other = iteris(net, adapters, tasks)[site], iteris(net, dense, tasks)[site]
        assert isinstance(one, LowRank) and isinstance(other, Dense)
        torch.testing.assert_close(one.dense(), other.dense(), rtol=0, atol=1e-9)


def test_rank_cuts_blend_counts_and_missing_sites_are_zero():
    net, tasks = Chain(2), [data(0), data(7)]
    adapters = [adapter(0, ALL[:2]), adapter(9, ALL[:1])]
    for weight in ("full", "delta", "none"):
        result = iteris(net, adapters, tasks, weight=weight, rank=2)
        assert [result.rank(site) for site in ALL[:2]] == [2, 2]
    full, blended = iteris(net, adapters, tasks), iteris(net, adapters, tasks, blend=1.0)
    once = iteris(net, adapters, tasks, max_iterations=1)
    assert torch.allclose(blended[ALL[1]].dense(), once[ALL[1]].dense(), atol=1e-10)
    assert not torch.allclose(full[ALL[1]].dense(), once[ALL[1]].dense(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0, "batches": [data(0, 3, 1), data(7, 2, 1)]}, MergeError, "more samples"),
        ({"weight": "both"}, ArgumentError, "full, delta or none"),
        ({"batches": [data(0)]}, ArgumentError, "as many lists"),
        ({"batches": [iter(data(0)), data(1)]}, ArgumentError, "iterator"),
    ],
)
def test_bad_input(options, error, message):
    batches = options.pop("batches", [data(0), data(7)])
    with pytest.raises(error, match=message):
        iteris(Chain(1), [adapter(0, ["layers.0"]), adapter(9, ["layers.0"])], batches, **options)


def test_unknown_sites_are_refused():
    with pytest.raises((MergeError, TargetError), match="nowhere"):
        iteris(Chain(1), [{"nowhere": adapter(0, ["x"])["x"]}], [data(0)])
