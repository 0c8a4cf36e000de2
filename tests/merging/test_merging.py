"""Mergers of one site and of whole adapters: exactness, truncation, the cross-term defect, and the way back onto a model."""

import functools

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.operators import Dense, LowRank
from rankwise.merging import as_adapter, cat, linear, merge_adapters, svd, task_arithmetic


def update(seed, m=9, n=7, r=2, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(m, r, generator=g, dtype=torch.float64), torch.randn(r, n, generator=g, dtype=torch.float64), scale
    )


def exact(updates, weights):
    return sum(w * u.dense() for u, w in zip(updates, weights, strict=True))


MIXED = [update(0, r=1, scale=0.5), update(1, r=3, scale=2.0), update(2, r=2)]
WEIGHTS = [0.3, -1.2, 0.7]


@pytest.mark.parametrize("merger", [cat, svd, task_arithmetic, functools.partial(linear, rank=6)])
def test_the_whole_sum_is_exact_for_mixed_ranks_and_scales(merger):
    merged = merger(MIXED, WEIGHTS)
    torch.testing.assert_close(merged.dense(), exact(MIXED, WEIGHTS), rtol=0, atol=1e-12)
    assert merged.scale == 1.0 and merged.rank <= 6


def test_no_weights_mean_the_plain_sum():
    torch.testing.assert_close(cat(MIXED).dense(), exact(MIXED, [1, 1, 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_best_of_its_rank(rank):
    total = exact(MIXED, WEIGHTS)
    merged = svd(MIXED, WEIGHTS, rank=rank)
    tail = torch.linalg.svdvals(total)[rank:].norm()
    assert merged.rank == rank
    torch.testing.assert_close((merged.dense() - total).norm(), tail, rtol=1e-10, atol=0)


def test_svd_never_forms_the_matrix(monkeypatch):
    tall = [update(seed, m=4000, n=3000, r=2) for seed in (0, 1)]
    seen = []
    original = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **k: (seen.append(tuple(matrix.shape)), original(matrix, **k))[1])
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("a dense (m, n) matrix was formed"))
    svd(tall, rank=2)
    assert seen == [(4, 4)]


def test_svd_takes_dense_updates_and_clamps_only_on_request():
    dense = Dense(torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    torch.testing.assert_close(svd([dense]).dense(), dense.matrix, rtol=0, atol=1e-12)
    clamped = svd(MIXED, clamp_quantile=0.5)
    free = svd(MIXED)
    sizes = torch.cat([free.B.flatten(), free.A.flatten()]).abs()
    assert torch.cat([clamped.B.flatten(), clamped.A.flatten()]).abs().max() <= sizes.median() + 1e-12


def test_linear_cuts_to_the_common_rank_and_the_table_says_what_that_costs():
    result = merge_adapters([{"a": u} for u in MIXED], "linear", weights=WEIGHTS)
    total = exact(MIXED, WEIGHTS)
    assert result.rank("a") == 3
    expected = (torch.linalg.svdvals(total)[3:].norm() / total.norm()).item()
    assert result.errors["a"] == pytest.approx(expected, rel=1e-9) and expected > 0.01
    assert f"{expected:.3g}" in str(result)


def test_peft_linear_has_exactly_the_published_cross_terms():
    first, second = update(0), update(1)
    wrong = linear([first, second], [1, -1], compat="peft").dense() - cat([first, second], [1, -1]).dense()
    torch.testing.assert_close(wrong, second.B @ first.A - first.B @ second.A, rtol=0, atol=1e-12)
    torch.testing.assert_close(linear([first], [0.7], compat="peft").dense(), 0.7 * first.dense(), rtol=0, atol=1e-12)
    with pytest.raises(MergeError, match=r"ranks \[2, 3\]"):
        linear([update(0), update(1, r=3)], compat="peft")


def test_task_arithmetic_keeps_dense_updates_and_scales():
    dense = Dense(update(5).dense() + torch.eye(9, 7, dtype=torch.float64))
    merged = task_arithmetic([dense, MIXED[0]], [1, 2], scale=0.5)
    torch.testing.assert_close(merged.dense(), 0.5 * (dense.matrix + 2 * MIXED[0].dense()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cat([]), MergeError, "at least one"),
        (lambda: cat([update(0), update(0, m=8)]), MergeError, r"\(9, 7\), \(8, 7\)"),
        (lambda: cat([update(0)], [1, 2]), ArgumentError, "1 updates need 1 weights"),
        (lambda: cat([Dense(torch.eye(4))]), MergeError, "numerical rank is 4"),
        (lambda: cat([LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 3))]), MergeError, "NaN"),
        (lambda: svd(MIXED, rank=0), ArgumentError, "at least 1"),
        (lambda: linear(MIXED, compat="pef"), ArgumentError, "peft"),
        (lambda: merge_adapters([{"a": MIXED[0]}], "svdd"), ArgumentError, "'svd'"),
        (lambda: merge_adapters([{"a": MIXED[0]}], "cat", rank=2), ArgumentError, "takes no rank="),
        (lambda: merge_adapters([{"a": update(0)}, {"a": update(0, m=8)}]), MergeError, "a has updates of shapes"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_site_that_one_adapter_lacks_counts_as_zero_and_is_reported():
    result = merge_adapters([{"a": MIXED[0], "b": update(7)}, {"a": MIXED[1]}], "cat", weights=[2.0, 1.0])
    torch.testing.assert_close(result["b"].dense(), 2 * update(7).dense(), rtol=0, atol=1e-12)
    assert result.present == {"a": 2, "b": 1} and result.error < 1e-12


def test_mergers_that_draw_or_read_data_fit_the_shelf():
    """The forms DARE (a generator) and RegMean (statistics of each adapter) need."""

    def dropped(updates, weights, *, generator):
        total = sum(w * u.dense() for u, w in zip(updates, weights, strict=True))
        return Dense(total * torch.rand(total.shape, generator=generator, dtype=torch.float64).gt(0.5) * 2)

    def regression(updates, weights, *, statistics):
        grams = [known.require_inputs().gram for known in statistics]
        right = sum(w * u.dense() @ G for u, G, w in zip(updates, grams, weights, strict=True))
        return Dense(right @ torch.linalg.inv(sum(w * G for G, w in zip(grams, weights, strict=True))))

    adapters = [{"a": update(0), "b": update(1)}, {"a": update(2), "b": update(3)}]
    one, again, other = (merge_adapters(adapters, dropped, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one["a"].dense(), again["a"].dense())
    assert not torch.equal(one["a"].dense(), other["a"].dense())
    net = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 9)).double()
    batches = [(torch.randn(30, 7, generator=torch.Generator().manual_seed(s), dtype=torch.float64), None) for s in (0, 1)]
    seen = [rw.collect(net, [batch], {rw.Statistic.INPUT_GRAM}, where=["0"]) for batch in batches]
    equal = merge_adapters([{"0": update(0)}, {"0": update(0)}], regression, statistics=seen)
    torch.testing.assert_close(equal["0"].dense(), update(0).dense(), rtol=0, atol=1e-9)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(11)
        self.first, self.second = nn.Linear(7, 9).double(), nn.Linear(9, 6).double()
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_as_adapter_acts_as_the_sum_with_a_rank_per_site_saves_and_loads(tmp_path):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adapters = [
        {"first": update(0), "second": update(1, 6, 9, 1)},
        {"first": update(2, r=3, scale=0.5), "second": update(3, 6, 9, 3)},
    ]
    result = merge_adapters(adapters, "cat", weights=[0.4, 0.6])
    net = Net()
    handle = as_adapter(net, result, "both")
    assert {site: handle.parameterization(site).rank for site in handle.targets} == {"first": 5, "second": 4}
    by_hand = Net()
    by_hand.first.weight.data += result["first"].dense()
    by_hand.second.weight.data += result["second"].dense()
    torch.testing.assert_close(net(x), by_hand(x), rtol=0, atol=1e-12)
    handle.save(tmp_path / "merged")
    again = Net()
    rw.load_(again, tmp_path / "merged")
    assert torch.equal(again(x), net(x))


def test_as_adapter_folds_ranks_beyond_the_layer_and_pads_a_common_rank():
    result = merge_adapters([{"first": update(s, r=4)} for s in range(3)], "cat")
    handle = as_adapter(Net(), result, "wide")
    assert handle.parameterization("first").rank == 7
    torch.testing.assert_close(handle.update_of("first").dense(), result["first"].dense(), rtol=0, atol=1e-11)
    common = as_adapter(Net(), {"first": update(0, r=1), "second": update(1, 6, 9, 3)}, "common", common_rank=True)
    assert {common.parameterization(site).rank for site in common.targets} == {3}
    torch.testing.assert_close(common.update_of("first").dense(), update(0, r=1).dense(), rtol=0, atol=1e-12)


def test_as_adapter_refuses_foreign_sites_and_dense_updates():
    with pytest.raises(MergeError, match="third"):
        as_adapter(Net(), {"first": update(0), "third": update(0)}, "x")
    with pytest.raises(MergeError, match="numerical rank is 7"):
        as_adapter(Net(), {"first": Dense(torch.eye(9, 7))}, "x")
