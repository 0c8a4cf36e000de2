"""Oracles of SHiRA: W' = W + values scattered to K = r(m + n) fixed entries of the weight.

The masks "gradient" and "snip" read the mean gradient that `rankwise.collect` gathers for `recipe.needs`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

shira = rw.catalog.shira
M, N, R = 12, 8, 2
K = R * (M + N)


def scattered(values, indices, m=M, n=N):
    delta = torch.zeros(m, n, dtype=values.dtype)
    for value, row, column in zip(values, *indices.tolist(), strict=True):
        delta[row, column] += value
    return delta


def build(layer=None, **options):
    """(model, handle, parameterization, values, W)."""
    layer = linear(M, N) if layer is None else layer
    W = layer.weight.detach().clone()
    model, handle, p = adapted(shira(**{"rank": R, **options}), layer)
    return model, handle, p, p.roles()["values"], W


def entries(p):
    """The chosen entries as a set of pairs."""
    return set(zip(*p.indices.tolist(), strict=True))


def largest(matrix, count):
    """The entries of largest magnitude."""
    return {(int(k) // matrix.shape[1], int(k) % matrix.shape[1]) for k in matrix.abs().flatten().topk(count).indices}


def test_start():
    layer, x = linear(M, N), randn(9, N, seed=1)
    base = layer(x).detach()
    model, _, _, values, _ = build(layer)
    assert torch.equal(values, torch.zeros(K, dtype=DOUBLE))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_1_dense_scatter(tokens):
    x = randn(tokens, N, seed=1)
    model, handle, p, values, W = build()
    fill(handle)
    delta = scattered(values.detach(), p.indices)
    assert torch.equal(handle.update_of("layer").dense().detach(), delta)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)


def test_1_equals_peft():
    peft = pytest.importorskip("peft")
    _, handle, p, values, _ = build()
    fill(handle)
    other = One(linear(M, N))
    peft.inject_adapter_in_model(peft.ShiraConfig(r=R, target_modules=["layer"]), other)
    kept = other.layer.shira_indices["default"]
    assert kept.shape == p.indices.shape
    other.layer.shira_indices["default"] = p.indices.to(kept.dtype)
    put(other.layer.shira_weight["default"], values)
    with torch.sparse.check_sparse_tensor_invariants():
        expected = other.layer.get_delta_weight("default").detach().to_dense()
    assert torch.equal(handle.update_of("layer").dense().detach(), expected)


@pytest.mark.parametrize("mask", ["random", "structured", "magnitude"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_2_as_many_entries_as_a_lora_of_the_rank_has_numbers(mask, rank):
    _, handle, p, values, _ = build(rank=rank, mask=mask)
    assert handle.trained_numbers == values.numel() == rank * (M + N)
    assert len(entries(p)) == rank * (M + N)  # no entry twice
    assert p.indices.shape == (2, rank * (M + N))
    assert p.indices.min() >= 0 and p.indices[0].max() < M and p.indices[1].max() < N
    put(values, 1.0)
    assert torch.count_nonzero(handle.update_of("layer").dense()) == rank * (M + N)


def test_2_a_rank_with_more_entries_than_the_weight_is_refused():
    with pytest.raises(rw.RankwiseError):  # 5 · 20 > 96, though 5 <= min(m, n)
        build(rank=5)


def test_3_gradient_is_gathered():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, handle, p, values, W = build()
    fill(handle)
    x.requires_grad_(True)
    G = backward(model, x, g).detach()
    close(grad(values), G[p.indices[0], p.indices[1]], 1e-12)
    close(grad(x), g @ (W + scattered(values.detach(), p.indices)), 1e-12)


def test_4_switching_a_thousand_times_in_bfloat16():
    layer, x = linear(M, N, dtype=torch.bfloat16), randn(9, N, seed=1, dtype=torch.bfloat16)
    model, handle, p, _, W = build(layer)
    fill(handle)
    base = F.linear(x, W, layer.bias.detach())
    for k in range(1000):
        handle.merge_()
        if k == 0:
            merged = layer.weight.detach().clone()
            changed = (merged != W).nonzero()
            assert {(int(o), int(i)) for o, i in changed} <= entries(p) and len(changed) > K // 2
        handle.unmerge_()
    assert torch.equal(layer.weight, W)
    handle.merge_()
    assert torch.equal(layer.weight, merged)
    handle.unmerge_()
    for _ in range(1000):
        rw.activate_(model, None)
        rw.activate_(model, "default")
    assert torch.equal(layer.weight, W)
    with rw.switched_off(model):
        assert torch.equal(model(x), base)
    handle.detach_()
    assert torch.equal(layer.weight, W) and torch.equal(model(x), base)


def test_5_disjoint_masks_do_not_interfere():
    def two():
        model = One(linear(M, N))
        handles = [rw.adapt_(model, shira(rank=R), where=["layer"], name=name, seed=k) for k, name in enumerate(("one", "two"))]
        chosen = [entries(handle.parameterization("layer")) for handle in handles]
        for k, handle in enumerate(handles):
            fill(handle, seed=30 + k)
            p = handle.parameterization("layer")
            shared = torch.tensor([pair in chosen[0] & chosen[1] for pair in zip(*p.indices.tolist(), strict=True)])
            put(p.roles()["values"], torch.where(shared, 0.0, p.roles()["values"].detach()))  # the rest is disjoint
        return model, handles

    weights = []
    for order in ((0, 1), (1, 0)):
        model, handles = two()
        W = model.layer.weight.detach().clone()
        updates = [handle.update_of("layer").dense().detach() for handle in handles]
        assert not ((updates[0] != 0) & (updates[1] != 0)).any() and (updates[0] != 0).sum() > K // 3
        for k in order:
            handles[k].merge_()
        weights.append(model.layer.weight.detach().clone())
        handles[order[0]].unmerge_()
        assert torch.equal(model.layer.weight, W + updates[order[1]])  # the other one alone, to the bit
        handles[order[1]].unmerge_()
        assert torch.equal(model.layer.weight, W)
    assert torch.equal(weights[0], weights[1])
    for update in updates:  # each can be read off the sum exactly
        assert torch.equal(torch.where(update != 0, weights[0], W), W + update)


def test_6_with_all_entries_it_is_full_fine_tuning():
    X, Y = randn(20, 3, seed=1), randn(20, 6, seed=2)  # r (m + n) = m n for r = 2, m = 6, n = 3
    layer = linear(6, 3)
    model, _, _, values, _ = build(layer)
    assert values.numel() == 18
    free = linear(6, 3)
    free.bias.requires_grad_(False)
    for _ in range(20):
        for network, tensor in ((model, values), (free, free.weight)):
            tensor.grad = None
            (network(X) - Y).square().mean().backward()
            put(tensor, tensor - 0.5 * grad(tensor))
        close(rw.effective_weights(model)["layer.weight"], free.weight, 1e-6)
    assert values.norm() > 0.1


def test_7_masks_differ_between_layers_and_repeat_with_the_seed():
    def masks(seed):
        model = nn.Sequential(linear(8, 8), linear(8, 8, seed=1))
        handle = rw.adapt_(model, shira(rank=R), seed=seed)
        return [entries(handle.parameterization(site)) for site in ("0", "1")]

    first, again, other = masks(0), masks(0), masks(1)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_8_weight_decay_acts_on_the_values():
    x = randn(9, N, seed=1)
    model, handle, p, values, W = build()
    fill(handle)
    before = values.detach().clone()
    optimizer = handle.optimizer(lr=0.1, weight_decay=0.5, decay_vectors=True)  # vectors are spared by default
    for _ in range(3):
        (model(x) * 0.0).sum().backward()  # no gradient: decay alone moves anything
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    close(values, before * (1 - 0.1 * 0.5) ** 3, 1e-12)
    assert torch.equal(model.layer.weight, W)  # decaying W would pull it to zero
    close(rw.effective_weights(model)["layer.weight"], W + scattered(values.detach(), p.indices), 1e-12)


def test_magnitude_mask():
    _, _, p, _, W = build(mask="magnitude")
    assert entries(p) == largest(W, K)


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_masks_from_calibration_data(mask):
    batches = [(randn(16, N, seed=k), torch.arange(16) % M) for k in (1, 2)]
    recipe, layer = shira(rank=R, mask=mask), linear(M, N)
    assert recipe.needs == {rw.Statistic.GRADIENT}
    W, model = layer.weight.detach().clone(), One(layer)
    G = torch.zeros(M, N, dtype=DOUBLE)
    for x, target in batches:
        free = W.clone().requires_grad_(True)
        F.cross_entropy(F.linear(x, free, layer.bias.detach()), target).backward()
        G += grad(free) / 2
    statistics = rw.collect(model, batches, recipe.needs, where=["layer"])
    handle = rw.adapt_(model, recipe, where=["layer"], statistics=statistics)
    assert entries(handle.parameterization("layer")) == largest(G if mask == "gradient" else W * G, K)


def test_indices_are_stored_and_read_back(tmp_path):
    x = randn(9, N, seed=1)
    model, handle, p, _, _ = build()
    fill(handle)
    handle.save(tmp_path / "saved")
    fresh = One(linear(M, N))
    again = rw.load_(fresh, tmp_path / "saved").parameterization("layer")
    assert torch.equal(again.indices, p.indices)
    close(fresh(x), model(x), 1e-12)
