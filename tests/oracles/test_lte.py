"""LTE against its spec (arXiv:2402.16828): low-rank heads on shards of the batch, averaged into the main weight.

Losses are sums over rows where a head's gradient matters, so that the local loss of a head is its part of the whole.
Oracle 1 also checks the weight of every head between merges. The second-hand accuracies are left to the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import RankwiseError
from rankwise.core.handle import Handle
from tests.oracles.tools_training import SITE, adapted, layer_model, normal, orthonormal, put, relative, roles_of

M, N, RANK, HEADS, SCALE = 5, 6, 2, 3, 1.5
Loss = Callable[[Tensor], Tensor]


def begin(
    *,
    m: int = M,
    n: int = N,
    rank: int = RANK,
    heads: int = HEADS,
    interval: int = 3,
    lr: float = 0.05,
    step: str = "sgd",
    **more,
):
    recipe = rankwise.catalog.lte(rank=rank, heads=heads, alpha=SCALE * rank, interval=interval, **more)
    model, handle = adapted(normal(0, m, n), rankwise.compose(recipe, step), seed=1)
    model.train()
    return model, handle, handle.optimizer(lr)


def forward_backward(model: nn.Module, handle: Handle, x: Tensor, loss: Loss) -> None:
    handle.backward(lambda: loss(model(x)))


def one_step(model: nn.Module, handle: Handle, optimizer, x: Tensor, loss: Loss) -> None:
    forward_backward(model, handle, x, loss)
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()


def fitting(t: int, rows: int = 12, m: int = M) -> Loss:
    return lambda y: ((y - normal(300 + t, rows, m)) ** 2).sum() / 10


def train(model: nn.Module, handle: Handle, optimizer, steps: int, *, first: int = 0, m: int = M, n: int = N) -> None:
    for t in range(first, first + steps):
        one_step(model, handle, optimizer, normal(200 + t, 12, n), fitting(t, m=m))


def products(handle: Handle) -> Tensor:
    """s B_h A_h of all heads, (H, m, n)."""
    roles = roles_of(handle)
    return handle.parameterization(SITE).scale * roles["B_heads"] @ roles["A_heads"]


def merged_products(handle: Handle) -> Tensor:
    buffers = dict(handle.parameterization(SITE).named_buffers())
    return handle.parameterization(SITE).scale * buffers["merged_B"].detach() @ buffers["merged_A"].detach()


def main_weight(handle: Handle, m: int = M, n: int = N) -> Tensor:
    return normal(0, m, n) + handle.update_of(SITE).dense().detach()


def head_weights(handle: Handle, heads: int = HEADS) -> Tensor:
    entry = handle.parameterization(SITE)
    return torch.stack([entry.head_weight(h).detach().clone() for h in range(heads)])


def test_start() -> None:
    """A orthogonal with rows of length √(n/r), another one per head; B zero; every head and the main weight equal W."""
    _, handle, _ = begin()
    roles = roles_of(handle)
    assert {role: tuple(tensor.shape) for role, tensor in roles.items()} == {
        "A_heads": (HEADS, RANK, N),
        "B_heads": (HEADS, M, RANK),
    }
    assert not roles["B_heads"].any()
    for A in roles["A_heads"]:
        assert relative(A @ A.T, N / RANK * torch.eye(RANK, dtype=torch.float64)) < 1e-12
    assert relative(roles["A_heads"][0], roles["A_heads"][1]) > 0.1
    assert handle.parameterization(SITE).scale == SCALE
    assert not handle.update_of(SITE).dense().any()
    assert relative(head_weights(handle), normal(0, M, N).expand(HEADS, M, N)) < 1e-14


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_1_heads_agree_after_a_merge(reset: bool, step: str) -> None:
    model, handle, optimizer = begin(step=step, reset=reset)
    for t in range(9):
        train(model, handle, optimizer, 1, first=t)
        apart = float((head_weights(handle) - main_weight(handle)).norm(dim=(1, 2)).max())
        if t % 3 == 2:
            assert apart < 1e-12
        else:
            assert apart > 1e-3


def test_1_heads_between_merges() -> None:
    """W_h + s B_h A_h with W_h = W - d_h of the last merge."""
    model, handle, optimizer = begin()
    base, previous = normal(0, M, N), torch.zeros(HEADS, M, N, dtype=torch.float64)
    for t in range(8):
        train(model, handle, optimizer, 1, first=t)
        now = products(handle)
        if t % 3 == 2:
            base, previous = base + (now - previous).mean(0), now  # W <- W + mean_h (d_h - d_h^prev)
        assert relative(main_weight(handle), base) < 1e-12
        assert relative(head_weights(handle), base - previous + now) < 1e-12
        assert float((merged_products(handle) - previous).norm()) < 1e-12


def test_1_each_head_sees_its_rows() -> None:
    """Rows are cut in order along the first axis, also where there are tokens behind it."""
    model, handle, optimizer = begin()
    train(model, handle, optimizer, 5)
    weights = head_weights(handle)
    for shape in ((6, N), (6, 4, N)):
        x = normal(7, *shape)
        expected = torch.cat([part @ weight.T for part, weight in zip(x.chunk(HEADS), weights, strict=True)])
        assert relative(model(x), expected) < 1e-12
    put(handle, {"B_heads": torch.zeros(HEADS, M, RANK)})  # so that only the first head differs
    with torch.no_grad():
        handle.blocks()[SITE]["B_heads"][0].fill_(1.0)
    x = normal(8, 6, N)
    forward_backward(model, handle, x, lambda y: y[2:].square().sum())  # the first head's rows are not in the loss
    gradient = handle.blocks()[SITE]["B_heads"].grad
    assert not gradient[0].any()
    assert bool(gradient[1].any())


def test_2_merges_telescope() -> None:
    """Without resets the main weight is W_init + mean_h s B_h A_h of the factors at the merge, of rank H r at most."""
    m, n = 9, 8
    model, handle, optimizer = begin(m=m, n=n)
    for merge in range(3):
        train(model, handle, optimizer, 3, first=3 * merge, m=m, n=n)
        update = handle.update_of(SITE).dense().detach()
        assert relative(update, products(handle).mean(0)) < 1e-12
        assert int(torch.linalg.matrix_rank(update, rtol=1e-10)) == HEADS * RANK
        factors = handle.low_rank_of(SITE)
        assert factors is not None
        assert relative(factors.B @ factors.A, update) < 1e-12


def test_2_resets_go_beyond_that_rank() -> None:
    m, n = 9, 8
    model, handle, optimizer = begin(m=m, n=n, rank=1, heads=2, reset=True)
    expected = torch.zeros(m, n, dtype=torch.float64)
    for merge in range(3):
        for t in range(3):
            forward_backward(model, handle, normal(200 + 3 * merge + t, 12, n), fitting(3 * merge + t, m=m))
            optimizer.step()
            if t == 2:
                expected = expected + products(handle).mean(0)  # W <- W + (1/H) Σ s B_h A_h
            handle.after_step()
            optimizer.zero_grad()
        assert not roles_of(handle)["B_heads"].any()
        assert relative(handle.update_of(SITE).dense(), expected) < 1e-12
    assert int(torch.linalg.matrix_rank(expected, rtol=1e-10)) > 2


def lora_like(handle: Handle, step: str, lr: float):
    """Ordinary LoRA that starts with the factors of the first head."""
    other, plain = adapted(normal(0, M, N), f"lora(rank={RANK}, alpha={SCALE * RANK}) + {step}", seed=2)
    put(plain, {"A": roles_of(handle)["A_heads"][0], "B": roles_of(handle)["B_heads"][0]})
    return other, plain, plain.optimizer(lr)


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_3_one_head_merged_every_step_is_lora(step: str) -> None:
    model, handle, optimizer = begin(heads=1, interval=1, step=step)
    other, plain, plain_optimizer = lora_like(handle, step, 0.05)
    for t in range(8):
        train(model, handle, optimizer, 1, first=t)
        train(other, plain, plain_optimizer, 1, first=t)
        expected = normal(0, M, N) + plain.update_of(SITE).dense().detach()
        assert relative(handle.parameterization(SITE).head_weight(0), expected) < 1e-9
        assert relative(main_weight(handle), expected) < 1e-9
        assert float(plain.update_of(SITE).dense().norm()) > 1e-2


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_4_equal_heads_on_equal_data_are_lora(step: str) -> None:
    model, handle, optimizer = begin(interval=1, step=step)
    put(handle, {"A_heads": roles_of(handle)["A_heads"][:1].expand(HEADS, RANK, N)})
    other, plain, plain_optimizer = lora_like(handle, step, 0.05)
    for t in range(8):
        x, y = normal(200 + t, 4, N), normal(300 + t, 4, M)
        one_step(model, handle, optimizer, x.repeat(HEADS, 1), lambda out, y=y: ((out - y.repeat(HEADS, 1)) ** 2).sum() / 10)
        one_step(other, plain, plain_optimizer, x, lambda out, y=y: ((out - y) ** 2).sum() / 10)
        expected = normal(0, M, N) + plain.update_of(SITE).dense().detach()
        assert relative(main_weight(handle), expected) < 1e-9


@pytest.mark.parametrize("same", [False, True])
def test_5_one_step_of_sgd_is_full_rank(same: bool) -> None:
    """-(η s²/H) Σ_h G_h A_hᵀ A_h; with A_h the blocks of √c times an orthogonal matrix and one G, -(η s² c/H) G."""
    heads, rank, c, lr = 3, 2, 2.5, 0.05
    assert heads * rank == N
    model, handle, optimizer = begin(heads=heads, rank=rank, interval=1, lr=lr)
    A = c**0.5 * orthonormal(5, N, N).reshape(heads, rank, N)
    put(handle, {"A_heads": A})  # B = 0, so A has no gradient and what was merged is zero still
    rows = 4
    x = normal(6, rows, N).repeat(heads, 1) if same else normal(6, rows * heads, N)
    cotangent = normal(7, rows, M).repeat(heads, 1) if same else normal(7, rows * heads, M)
    one_step(model, handle, optimizer, x, lambda y: (y * cotangent).sum())
    G = torch.stack([g.T @ part for g, part in zip(cotangent.chunk(heads), x.chunk(heads), strict=True)])
    expected = -(lr * SCALE**2 / heads) * (G @ A.mT @ A).sum(0)
    found = handle.update_of(SITE).dense().detach()
    assert relative(found, expected) < 1e-12
    assert torch.equal(roles_of(handle)["A_heads"], A)
    if same:
        assert relative(found, -(lr * SCALE**2 * c / heads) * G[0]) < 1e-12


@pytest.mark.parametrize("interval", [1, 3, 4])
def test_6_merges_come_every_interval(interval: int) -> None:
    model, handle, optimizer = begin(interval=interval)
    merges = []
    for t in range(9):
        before = merged_products(handle)
        train(model, handle, optimizer, 1, first=t)
        if not torch.equal(before, merged_products(handle)):
            merges.append(t)
    assert merges == list(range(interval - 1, 9, interval))


@pytest.mark.parametrize("rows", [1, 4, 10])
def test_6_a_batch_that_cannot_be_cut_is_refused(rows: int) -> None:
    model, _, _ = begin()
    with pytest.raises(RankwiseError, match=rf"(?s)({rows}.*{HEADS}|{HEADS}.*{rows})"):
        model(normal(1, rows, N))
    model.eval()
    assert model(normal(1, rows, N)).shape == (rows, M)  # evaluation has no heads


def test_7_eval_uses_the_main_weight() -> None:
    model, handle, optimizer = begin()
    x = normal(9, 5, N)
    for t in range(7):
        model.train()
        train(model, handle, optimizer, 1, first=t)
        model.eval()
        assert relative(model(x), x @ main_weight(handle).T) < 1e-12
        gaps = [relative(model(x), x @ weight.T) for weight in head_weights(handle)]
        assert max(gaps) < 1e-12 if t % 3 == 2 else min(gaps) > 1e-4  # stale between merges


def test_the_last_merge_is_stored() -> None:
    """A checkpoint without d_h^prev would move every head by it."""
    model, handle, optimizer = begin()
    train(model, handle, optimizer, 5)
    other, again, _ = begin()
    again.parameterization(SITE).load_state_dict(handle.parameterization(SITE).state_dict())
    assert {"merged_A", "merged_B"} <= set(handle.parameterization(SITE).state_dict())
    assert relative(head_weights(again), head_weights(handle)) < 1e-14
    x = normal(9, 6, N)
    assert torch.equal(other(x), model(x))


def test_optimizer_state_survives_a_merge_without_reset() -> None:
    model, handle, optimizer = begin(step="adamw")
    forward_backward(model, handle, normal(1, 12, N), fitting(0))
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()
    train(model, handle, optimizer, 1, first=1)
    forward_backward(model, handle, normal(2, 12, N), fitting(2))
    optimizer.step()
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in handle.blocks()[SITE].values()]
    factors = roles_of(handle)
    handle.after_step()  # the merge
    for state, tensor in zip(states, handle.blocks()[SITE].values(), strict=True):
        assert all(torch.equal(optimizer.state[tensor][name], value) for name, value in state.items())
        assert any(bool(value.any()) for value in state.values())
    assert all(torch.equal(tensor, factors[role]) for role, tensor in roles_of(handle).items())


def test_two_layers_cut_the_batch_alike() -> None:
    model = layer_model(normal(0, M, N), other=normal(1, 4, M))
    handle = rankwise.adapt_(
        model, rankwise.compose(rankwise.catalog.lte(rank=2, heads=2, alpha=4.0, interval=50), "sgd"), seed=1
    )
    optimizer = handle.optimizer(0.005)  # ten times more diverges: the first loss is 111
    model.train()
    for t in range(4):
        one_step(model, handle, optimizer, normal(t, 8, N), lambda y: (y - 1).square().mean())
    one, two = (handle.parameterization(site) for site in (SITE, "other"))
    x = normal(9, 6, N)
    expected = [part @ one.head_weight(h).T @ two.head_weight(h).T for h, part in enumerate(x.chunk(2))]
    assert relative(model(x), torch.cat(expected)) < 1e-12
    assert relative(expected[0], x[:3] @ one.head_weight(1).T @ two.head_weight(1).T) > 1e-3
