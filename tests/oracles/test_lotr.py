"""Oracles of LoTR: W_k' = W_k + s L M_k R, with L (m, r) and R (r, n) shared by all layers of one shape; s = scale / r."""

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from tests.oracles.tools import adapted, close, fill, grad, linear, put, randn

lotr = rw.catalog.lotr


class Side(nn.Module):
    """Layers of one shape side by side: x (K, T, n) -> (K, T, m)."""

    def __init__(self, count: int, m: int, n: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([linear(m, n, seed=k) for k in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[k]) for k, layer in enumerate(self.layers)])


def begin(count, m, n, **options):
    model = Side(count, m, n)
    return model, rw.adapt_(model, lotr(**options))


def shared(handle, *shape):
    (found,) = [tensor for tensor in handle.bank.parameters() if tensor.shape == shape]
    return found


def cores(handle):
    return [handle.parameterization(site).roles()["core"] for site in handle.targets]


def updates(handle):
    return [handle.update_of(site).dense() for site in handle.targets]


@pytest.mark.parametrize(("rank", "table"), [(1, 3096), (2, 4704), (4, 8064), (8, 15_360), (16, 32_256), (32, 75_264)])
def test_1_counts_of_the_published_table(rank, table):
    # query and value of RoBERTa-base in one group: 24 layers with m + n = 1536, here slim; the table counts a head of 2·768
    model = nn.Sequential(*[nn.Linear(32, 1504, bias=False) for _ in range(24)])
    assert rw.adapt_(model, lotr(rank=rank)).trained_numbers + 2 * 768 == table


def test_1_layers_of_another_shape_are_another_group():
    model = nn.Sequential(linear(5, 5), linear(5, 5, seed=1), linear(9, 5, seed=2))
    assert rw.adapt_(model, lotr(rank=2)).trained_numbers == 2 * (5 + 5) + 2 * (9 + 5) + 3 * 4


def test_2_start_and_first_gradients():
    x, g = randn(3, 8, 5, seed=1), randn(3, 8, 7, seed=2)
    base = Side(3, 7, 5)(x).detach()
    model, handle = begin(3, 7, 5, rank=2)
    assert torch.equal(model(x), base)
    (model(x) * g).sum().backward()
    L, R = shared(handle, 7, 2), shared(handle, 2, 5)
    for tensor in (L, R):
        assert tensor.grad is None or not tensor.grad.any()
    for k, core in enumerate(cores(handle)):
        assert not core.any()
        close(grad(core), 0.5 * L.t() @ (g[k].t() @ x[k]) @ R.t(), 1e-12)


def test_2_factors_start_as_standard_normal_numbers():
    for std in (1.0, 0.25):
        _, handle = begin(2, 60, 50, rank=20, factor_std=std)
        for tensor in (shared(handle, 60, 20), shared(handle, 20, 50)):
            assert float(tensor.std()) == pytest.approx(std, rel=0.08)
            assert abs(float(tensor.mean())) < 5 * std / 1000**0.5


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_3_one_layer_is_the_triple_and_reaches_every_lora(scale):
    m, n, r = 7, 5, 3
    _, handle, p = adapted(lotr(rank=r, scale=scale), linear(m, n))
    fill(handle)
    L, M, R = shared(handle, m, r), p.roles()["core"], shared(handle, r, n)
    close(handle.update_of("layer").dense(), scale / r * L @ M @ R, 1e-12)
    factors = handle.low_rank_of("layer")
    assert factors is not None and factors.rank == r
    close(factors.B @ factors.A, scale / r * L @ M @ R, 1e-12)
    B, A = randn(m, r, seed=3), randn(r, n, seed=4)
    put(L, B)
    put(R, A)
    put(M, torch.eye(r, dtype=torch.float64) * r / scale)
    close(handle.update_of("layer").dense(), B @ A, 1e-12)


def test_3_with_its_frames_it_is_lora_xs():
    _, handle, p = adapted(lotr(rank=3, scale=3.0), linear(7, 5))
    _, other, q = adapted(rw.catalog.lora_xs(rank=3), linear(7, 5))
    fill(other)
    pair = other.low_rank_of("layer")
    R = q.roles()["R"]
    assert pair is not None
    put(p.roles()["core"], R)
    put(shared(handle, 3, 5), torch.linalg.lstsq(R, torch.linalg.solve(q.B.t() @ q.B, q.B.t() @ pair.B @ pair.A)).solution)
    put(shared(handle, 7, 3), q.B)
    close(handle.update_of("layer").dense(), other.update_of("layer").dense(), 1e-10)


def test_3_identity_cores_are_the_pure_tying_of_tied_lora():
    class Block(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.proj = linear(7, 5, seed=k)

    def stack():
        return nn.ModuleList([Block(k) for k in range(3)])

    handle = rw.adapt_(stack(), lotr(rank=2, scale=2.0))
    tied = rw.adapt_(stack(), rw.catalog.tied_lora(rank=2, train="AB"))
    fill(tied)
    for shape in ((7, 2), (2, 5)):
        (value,) = [tensor for tensor in tied.bank.parameters() if tensor.shape == shape]
        put(shared(handle, *shape), value)
    for core in cores(handle):
        put(core, torch.eye(2, dtype=torch.float64))
    for mine, theirs in zip(updates(handle), updates(tied), strict=True):
        close(mine, theirs, 1e-12)


def test_4_ranks_of_the_unfoldings():
    _, handle = begin(5, 7, 6, rank=2)
    fill(handle)
    parts = updates(handle)
    for unfolding in (torch.cat(parts, 1), torch.cat(parts, 0)):  # (m, Kn) and (Km, n)
        S = torch.linalg.svdvals(unfolding)
        assert S[1] > 1e-3 * S[0]
        assert S[2] < 1e-12 * S[0]
    third = torch.linalg.svdvals(torch.stack([part.flatten() for part in parts]))  # the layer index is not compressed
    assert third[3] > 1e-6 * third[0]


def test_4_gauge():
    _, handle = begin(4, 7, 6, rank=3)
    fill(handle)
    before = [part.detach().clone() for part in updates(handle)]
    P, Q = randn(3, 3, seed=3), randn(3, 3, seed=4)
    L, R = shared(handle, 7, 3), shared(handle, 3, 6)
    put(L, L @ P)
    put(R, Q @ R)
    for core in cores(handle):
        put(core, torch.linalg.solve(P, core) @ torch.linalg.inv(Q))
    for part, expected in zip(updates(handle), before, strict=True):
        close(part, expected, 1e-10)


def test_5_common_spaces_are_fitted_where_lora_of_the_same_budget_cannot():
    K, m, r = 3, 6, 2
    left, right = randn(m, r, seed=1), randn(r, m, seed=2)
    goals = torch.stack([left @ randn(r, r, seed=3 + k) @ right for k in range(K)])
    model, handle = begin(K, m, m, rank=r)
    x = randn(20, m, seed=9)
    y = torch.stack([layer(x).detach() + x @ goals[k].t() for k, layer in enumerate(model.layers)])
    trained = [tensor for block in handle.blocks().values() for tensor in block.values()]
    assert sum(tensor.numel() for tensor in trained) == 36
    optimizer = torch.optim.LBFGS(trained, lr=1, max_iter=400, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (model(x.expand(K, -1, -1)) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure()) < 1e-6
    # LoRA of rank 1 per layer has 36 numbers too; the best it can do on this input, in closed form
    root = torch.linalg.cholesky(x.t() @ x)
    floor = sum(torch.linalg.svdvals(goal @ root)[1:].square().sum() for goal in goals) / y.numel()
    assert float(floor) > 1e-2


def test_6_shared_gradients_are_sums_over_the_layers():
    x, g, s = randn(3, 8, 5, seed=1), randn(3, 8, 7, seed=2), 3.0 / 2
    model, handle = begin(3, 7, 5, rank=2, scale=3.0)
    fill(handle)
    (model(x) * g).sum().backward()
    L, R = shared(handle, 7, 2), shared(handle, 2, 5)
    G = [g[k].t() @ x[k] for k in range(3)]
    close(grad(L), s * sum(G[k] @ R.t() @ M.t() for k, M in enumerate(cores(handle))), 1e-10)
    close(grad(R), s * sum(M.t() @ L.t() @ G[k] for k, M in enumerate(cores(handle))), 1e-10)
    for k, M in enumerate(cores(handle)):
        close(grad(M), s * L.t() @ G[k] @ R.t(), 1e-10)


def test_6_factors_stay_shared_after_loading(tmp_path):
    _, handle = begin(3, 7, 5, rank=2)
    fill(handle)
    handle.save(tmp_path / "adapter")
    again = rw.load_(Side(3, 7, 5), tmp_path / "adapter")
    for adapter in (handle, again):
        put(shared(adapter, 7, 2), randn(7, 2, seed=8))
    for mine, theirs in zip(updates(again), updates(handle), strict=True):
        close(mine, theirs, 1e-12)
