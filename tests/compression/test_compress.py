import copy

import pytest
import torch
from torch import nn

import rankwise
from rankwise.approximations.pissa import PiSSA
from rankwise.compression import SVDLLM, Factorized, compensate, compress_, eora, rank_for, svd_llm
from rankwise.core.errors import ArgumentError, StatisticsError, TargetError
from rankwise.core.statistics import Statistic


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, stride=2)
        self.hidden = nn.Linear(32, 14)
        self.other = nn.Linear(32, 14, bias=False)
        self.last = nn.Linear(14, 9)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.grouped(torch.tanh(self.first(x)))).flatten(1)
        return self.last(torch.tanh(self.hidden(h)) + self.other(h))


def batches(count=4, rows=12):
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, 2, 6, 6, generator=g, dtype=torch.float64), torch.randint(4, (rows,), generator=g))
        for _ in range(count)
    ]


def test_rank_formula():
    assert rank_for(4096, 4096, 0.8) == 1638
    assert rank_for(11008, 4096, 0.8) == 2388
    assert rank_for(60, 30, 0.3) == 6  # 0.3 · 1800 / 90 is 6, whatever floating point says
    for m, n, keep in [(7, 13, 0.5), (16, 16, 0.9), (9, 4, 0.35)]:
        r = rank_for(m, n, keep)
        assert r * (m + n) <= keep * m * n < (r + 1) * (m + n)


def test_full_rank_factors_give_the_same_model():
    net, before, x = Net(), Net(), batches()[0][0]
    for site in ("first", "grouped", "hidden", "other", "last"):
        rank = min(rankwise.core.targets.find_targets(net, site)[0][site].matrix().shape)
        compress_(net, PiSSA(), rank=rank, where=site)
    assert all(isinstance(net.get_submodule(site), Factorized) for site in ("first", "grouped", "hidden", "other", "last"))
    torch.testing.assert_close(net(x), before(x), rtol=0, atol=1e-12)
    assert torch.equal(net.first.B.bias, before.first.bias)
    assert net.other.B.bias is None


def test_svd_llm_reports_the_error_that_is_measured_on_the_outputs():
    net, before, data = Net(), Net(), batches()
    report = svd_llm(net, data, keep=0.5, where="all-layers")
    modules = dict(before.named_modules())
    inputs, hooks = {}, []
    for layer in report.layers:
        hooks.append(
            modules[layer.site].register_forward_hook(
                lambda _, given, __, site=layer.site: inputs.setdefault(site, []).append(given[0].detach())
            )
        )
    for x, _ in data:
        before(x)
    for layer in report.layers:
        compressed, dense = net.get_submodule(layer.site), modules[layer.site]
        measured = sum((compressed(x) - dense._conv_forward(x, dense.weight, dense.bias) if isinstance(dense, nn.Conv2d)
                        else compressed(x) - nn.functional.linear(x, dense.weight, dense.bias)).square().sum()
                       for x in inputs[layer.site]) ** 0.5  # fmt: skip
        if layer.site == "grouped":
            assert layer.basis == "pooled"
            assert measured < layer.error
        else:
            assert layer.basis == "outputs"
            assert layer.error == pytest.approx(measured.item(), rel=1e-8)
        assert layer.error == pytest.approx(layer.predicted, rel=1e-8)
        assert layer.parameters_after <= 0.5 * layer.parameters_before
        assert layer.parameters_after == sum(p.numel() for k, p in compressed.named_parameters() if k.endswith("weight"))
    assert report.parameters_after == sum(p.numel() for p in net.parameters())
    assert report.parameters_before == sum(p.numel() for p in Net().parameters())
    text = str(report)
    for word in ("SVDLLM: 5 layers", "grouped", "8×27", "predicted", "outputs"):
        assert word in text


def test_plain_truncation_loses_more_on_the_data_and_says_so():
    data = batches()
    statistics = rankwise.collect(Net(), data, SVDLLM.needs, "all-layers")
    plain = compress_(Net(), PiSSA(), keep=0.5, statistics=statistics, where="all-layers")
    whitened = compress_(Net(), SVDLLM(), keep=0.5, statistics=statistics, where="all-layers")
    assert all(p.error >= p.predicted * (1 - 1e-9) for p in plain.layers)
    assert sum(p.error for p in plain.layers) > 1.02 * sum(w.error for w in whitened.layers)


def test_training_goes_on_and_nothing_is_drawn_from_the_global_generator():
    net = Net()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    svd_llm(net, batches(), keep=0.6, where="all-layers", skip="last", update=True)
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(net.last, nn.Linear)
    handle = rankwise.adapt_(net, rankwise.catalog.lora(rank=2), where=lambda name, _: name.endswith(".B"))
    assert set(handle.targets) == {"first.B", "grouped.B", "hidden.B", "other.B"}
    net(batches()[0][0]).sum().backward()
    assert handle.parameterization("grouped.B").B.grad.abs().sum() > 0


def test_update_is_a_fixed_point_on_unchanged_inputs_and_helps_behind_changed_ones():
    data = batches()
    alone = Net()
    statistics = rankwise.collect(alone, data, SVDLLM.needs, ["hidden"])
    cut = copy.deepcopy(alone)
    compress_(cut, SVDLLM(), rank=4, statistics=statistics, where=["hidden"])
    report = svd_llm(alone, data, keep=None, rank=4, where=["hidden"], update=True)
    torch.testing.assert_close(alone.hidden.B.weight, cut.hidden.B.weight, rtol=0, atol=1e-9)
    assert report.updated["hidden"][1] == pytest.approx(report.layers[0].predicted, rel=1e-6)
    net, before = Net(), Net()
    report = svd_llm(net, data, keep=0.4, where="all-layers", update=True)
    assert list(report.updated) == ["first", "grouped", "hidden", "other", "last"]
    assert all(after <= old * (1 + 1e-9) for old, after in report.updated.values())
    assert report.updated["last"][1] < 0.98 * report.updated["last"][0]
    plain = Net()
    svd_llm(plain, data, keep=0.4, where="all-layers")
    error = [sum((one(x) - before(x)).square().sum().item() for x, _ in data) for one in (net, plain)]
    assert error[0] < 0.95 * error[1]
    assert error[0] ** 0.5 == pytest.approx(report.updated["last"][1], rel=1e-6)
    assert "second factor fitted" in str(report)


def test_padded_tokens_do_not_count_in_the_update():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(6, 8).double(), nn.Linear(8, 5).double()

        def forward(self, x, attention_mask=None):
            return self.b(torch.tanh(self.a(x)))

    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 6, generator=g, dtype=torch.float64)
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[:, 4:] = 0
    junk = x.clone()
    junk[:, 4:] = 100.0
    nets = [Tokens(), Tokens()]
    for net, given in zip(nets, (x, junk), strict=True):
        svd_llm(net, [{"x": given, "attention_mask": mask}], keep=0.5, update=True)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_embedding_factorizes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6, padding_idx=0)).double()
    before = copy.deepcopy(net)
    compress_(net, PiSSA(), rank=6, where="0")
    tokens = torch.tensor([[0, 3, 10]])
    torch.testing.assert_close(net(tokens), before(tokens), rtol=0, atol=1e-12)
    assert net[0].low_rank().dense().shape == (6, 11)


def test_refusals():
    net = Net()
    with pytest.raises(ArgumentError, match="either keep= or rank="):
        compress_(net, PiSSA())
    with pytest.raises(ArgumentError, match=r"last is 9×14 and has ranks 1 to 9; this is rank 10\. .*skip=\['last'\]"):
        compress_(net, PiSSA(), rank=10)
    with pytest.raises(ArgumentError, match=r"keep=0\.01 gives rank 0"):
        compress_(net, PiSSA(), keep=0.01)
    with pytest.raises(ArgumentError, match=r"in \(0, 1\], not 20"):
        compress_(net, PiSSA(), keep=20)
    with pytest.raises(StatisticsError, match="SVDLLM needs INPUT_GRAM"):
        compress_(net, SVDLLM(), keep=0.5)
    with pytest.raises(TargetError, match=r"'lst' is none of the chosen layers\. Did you mean 'last'"):
        compress_(net, PiSSA(), rank=2, skip=["lst"])
    with pytest.raises(ArgumentError, match="B = 0"):
        compress_(net, rankwise.catalog.nystrom_nora().start.build(), rank=2)
    with pytest.raises(ArgumentError, match="LoftQ is a start for training"):
        compress_(net, rankwise.catalog.loftq().start.build(), rank=2)
    with pytest.raises(StatisticsError, match="no batches"):
        svd_llm(net, [])
    rankwise.adapt_(net, rankwise.catalog.lora(rank=2), "hidden")
    with pytest.raises(TargetError, match="hidden carries an adapter"):
        compress_(net, PiSSA(), rank=2)
    tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    with pytest.raises(TargetError, match=r"0\.weight is the same tensor as 1\.weight"):
        compress_(tied, PiSSA(), rank=2)
    assert isinstance(net.last, nn.Linear)  # nothing was half done


def pruned(net):
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(parameter.abs() > parameter.abs().median())
    return net


@pytest.mark.parametrize("tokens", [5, 60])
def test_compensation_has_the_error_that_theory_says(tokens):
    g = torch.Generator().manual_seed(0)
    W, X = (torch.randn(9, 8, generator=g, dtype=torch.float64), torch.randn(8, tokens, generator=g, dtype=torch.float64))
    X *= torch.logspace(-1, 1, 8, dtype=torch.float64)[:, None]
    Wc = W * (W.abs() > 0.5)
    C = X @ X.t()
    pair = compensate(W, Wc, C, 3)
    error = ((W - Wc - pair.dense()) @ X).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals((W - Wc) @ X)[3:].norm(), rtol=1e-7, atol=1e-9)
    assert error <= ((W - Wc - compensate(W, Wc, None, 3).dense()) @ X).norm()
    torch.testing.assert_close(compensate(W, Wc, C, 8).dense(), W - Wc)
    assert compensate(W, W, C, 3).dense().abs().max() == 0


def test_eora_puts_an_adapter_that_brings_the_model_back(tmp_path):
    dense, net, data = Net(), pruned(Net()), batches()
    lost = [(net(x) - dense(x)).detach() for x, _ in data]
    frozen = copy.deepcopy(net)
    handle = eora(net, dense, data, rank=4, where="all-layers")
    after = [(net(x) - dense(x)).detach() for x, _ in data]
    assert sum(t.norm() for t in after) < 0.5 * sum(t.norm() for t in lost)
    handle.save(tmp_path)
    again = copy.deepcopy(frozen)
    rankwise.load_(again, tmp_path)
    torch.testing.assert_close(again(data[0][0]), net(data[0][0]), rtol=0, atol=1e-13)
    parallel = pruned(Net())
    eora(parallel, dense, data, rank=4, where="all-layers", sequential=False)
    assert (parallel(data[0][0]) - net(data[0][0])).abs().max() > 1e-6  # the inputs of later layers differ
    handle.detach_()
    assert all(torch.equal(t, frozen.state_dict()[k]) for k, t in net.state_dict().items())


def test_eora_measures_behind_the_layers_compensated_before():
    dense, net, data = Net(), pruned(Net()), batches()
    handle = eora(net, dense, data, rank=3, where=["hidden", "last"])
    found = rankwise.collect(net, data, {Statistic.INPUT_GRAM}, ["last"])["last"].inputs.gram
    want = compensate(dense.last.weight, pruned(Net()).last.weight, found, 3)
    torch.testing.assert_close(handle.low_rank_of("last").dense(), want.dense(), rtol=1e-8, atol=1e-10)


def test_eora_refuses_a_model_that_is_not_the_dense_one():
    net, data = pruned(Net()), batches()
    with pytest.raises(TargetError, match="dense weights lack hidden"):
        eora(net, {"last": torch.zeros(9, 14)}, data, rank=2)
    with pytest.raises(TargetError, match=r"last is 9×14 in the compressed model, but its dense weight is \(9, 13\)"):
        eora(net, {"last": torch.zeros(9, 13)}, data, rank=2, where="last")
    assert type(net.last) is nn.Linear


def test_collecting_gradients_leaves_running_statistics_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = copy.deepcopy(net.state_dict())
    rankwise.collect(net, [(torch.randn(8, 4) + 5, torch.zeros(8, dtype=torch.long))], {Statistic.GRADIENT})
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
