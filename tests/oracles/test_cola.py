"""COLA against its spec (arXiv:2401.04151): a chain of low-rank adapters, each absorbed before the next one starts fresh.

Exact stage solutions are put in by hand with rate 0. The learning rate of a stage is the user's schedule and has no oracle
here; published scores are left to the benchmark.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handle import Handle
from tests.oracles.tools_training import SITE, layer_model, normal, put, relative, roles_of, truncated

M, N, RANK, ALPHA = 9, 7, 2, 4.0


def begin(*, lr: float = 0.05, step: str = "sgd", dtype: torch.dtype = torch.float64, seed: int = 1, **options):
    options = {"rank": RANK, "alpha": ALPHA, "interval": 4, **options}
    model = layer_model(normal(0, M, N).to(dtype))
    handle = rankwise.adapt_(model, rankwise.compose(rankwise.catalog.cola(**options), step), seed=seed)
    return model, handle, handle.optimizer(lr)


def batch(t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(100 + t, 12, N).to(dtype), normal(200 + t, 12, M).to(dtype)


def one_step(model: nn.Module, handle: Handle, optimizer, t: int) -> None:
    x, y = batch(t, next(model.parameters()).dtype)
    handle.backward(lambda: ((model(x) - y) ** 2).mean())
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()


def total(handle: Handle) -> Tensor:
    return handle.update_of(SITE).dense().detach().clone()


def end_stage(handle: Handle, optimizer, update: Tensor | None = None) -> None:
    """One step of rate 0; with `update`, the stage is left with exactly this s B A."""
    model, x = handle.model, batch(0)[0]
    handle.backward(lambda: model(x).square().mean())
    optimizer.step()
    if update is not None:
        block = handle.blocks()[SITE]
        rank = block["A"].shape[0]
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        put(handle, {"B": U[:, :rank] * S[:rank] / handle.parameterization(SITE).scale, "A": Vh[:rank]})
    handle.after_step()
    optimizer.zero_grad()


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_1_one_stage_is_lora_to_the_bit(step: str) -> None:
    model, handle, optimizer = begin(step=step, interval=100)
    other = layer_model(normal(0, M, N))
    plain = rankwise.adapt_(other, rankwise.compose(f"lora(rank={RANK}, alpha={ALPHA})", step), seed=1)
    plain_optimizer = plain.optimizer(0.05)
    for t in range(8):
        one_step(model, handle, optimizer, t)
        one_step(other, plain, plain_optimizer, t)
    assert all(torch.equal(roles_of(handle)[role], tensor) for role, tensor in roles_of(plain).items())
    assert torch.equal(model(batch(0)[0]), other(batch(0)[0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_2_a_knot_does_not_move_the_function(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    """Nor does dropout take part of the update away when it is absorbed."""
    model, handle, optimizer = begin(dtype=dtype, dropout=dropout, ranks=[2, 1])
    x = batch(0, dtype)[0]
    for t in range(12):
        model.train()
        handle.backward(lambda t=t: ((model(x) - batch(t, dtype)[1]) ** 2).mean())
        optimizer.step()
        model.eval()
        before, W, A = model(x).detach(), total(handle), roles_of(handle)["A"]
        model.train()
        handle.after_step()
        optimizer.zero_grad()
        model.eval()
        assert relative(model(x), before) < tolerance
        assert relative(total(handle), W) < tolerance
        if t % 4 == 3:
            assert not roles_of(handle)["B"].any()
            fresh = roles_of(handle)["A"]
            assert fresh.shape != A.shape or relative(fresh, A) > 0.1
            assert float(fresh.abs().max()) > 0
        else:
            assert torch.equal(roles_of(handle)["A"], A)
            assert bool(roles_of(handle)["B"].any())


def test_2_fresh_factors_differ_from_stage_to_stage() -> None:
    _, handle, optimizer = begin(lr=0.0, interval=1)
    starts = [roles_of(handle)["A"]]
    for _ in range(3):
        end_stage(handle, optimizer)
        starts.append(roles_of(handle)["A"])
        assert float(starts[-1].abs().max()) <= 1 / N**0.5  # Kaiming uniform with a = √5
    assert all(relative(one, two) > 0.1 for i, one in enumerate(starts) for two in starts[:i])


@pytest.mark.parametrize("ranks", [None, [2, 1], [1, 1]])
def test_3_the_chain_is_one_wider_adapter(ranks: list[int] | None) -> None:
    """The merged weight, the sum of the stages' s B A, and their concatenation are the same."""
    model, handle, optimizer = begin(ranks=ranks)
    stages, widths = torch.zeros(M, N, dtype=torch.float64), list[int]()
    for t in range(12):
        x, y = batch(t)
        handle.backward(lambda x=x, y=y: ((model(x) - y) ** 2).mean())
        optimizer.step()
        if t % 4 == 3:
            block = roles_of(handle)
            stages = stages + handle.parameterization(SITE).scale * block["B"] @ block["A"]
            widths.append(block["A"].shape[0])
        handle.after_step()
        optimizer.zero_grad()
    assert widths == [RANK, *(ranks or [RANK, RANK])]
    assert relative(total(handle), stages) < 1e-12
    factors = handle.low_rank_of(SITE)
    assert factors is not None
    assert relative(factors.B @ factors.A, stages) < 1e-12
    x = batch(0)[0]
    assert relative(model(x), x @ (normal(0, M, N) + stages).T) < 1e-12


def test_3_all_stages_are_stored(tmp_path: Path) -> None:
    model, handle, optimizer = begin(ranks=[2, 1])
    for t in range(10):
        one_step(model, handle, optimizer, t)
    handle.save(tmp_path)
    other = layer_model(normal(0, M, N))
    loaded = rankwise.load_(other, tmp_path)
    assert relative(total(loaded), total(handle)) < 1e-12
    assert relative(other(batch(0)[0]), model(batch(0)[0])) < 1e-12


@pytest.mark.parametrize("ranks", [None, [1], [2, 1]])
def test_4_the_rank_adds_up(ranks: list[int] | None) -> None:
    model, handle, optimizer = begin(ranks=ranks)
    expected = 0
    for stage in range(3):
        rank = RANK if stage == 0 or ranks is None else ranks[min(stage - 1, len(ranks) - 1)]
        assert roles_of(handle)["A"].shape == (rank, N)
        assert roles_of(handle)["B"].shape == (M, rank)
        for t in range(4):
            one_step(model, handle, optimizer, 4 * stage + t)
        expected += rank
        assert int(torch.linalg.matrix_rank(total(handle), rtol=1e-10)) == expected


@pytest.mark.parametrize("ranks", [None, [1, 1]])
def test_5_exact_stages_are_a_greedy_svd(ranks: list[int] | None) -> None:
    """Each stage solves min ½‖W - W*‖² by its best rank; after Σ r_k ranks it is the truncated SVD of W* - W0."""
    _, handle, optimizer = begin(lr=0.0, interval=1, ranks=ranks)
    gap = normal(3, M, N) - normal(0, M, N)
    values, done = torch.linalg.svdvals(gap), 0
    for _ in range(3):
        done += roles_of(handle)["A"].shape[0]
        end_stage(handle, optimizer, gap - total(handle))
        left = float((gap - total(handle)).square().sum())
        assert left == pytest.approx(float(values[done:].square().sum()), rel=1e-6)
        assert relative(total(handle), truncated(gap, done)) < 1e-6


def test_6_the_budget_is_that_of_lora() -> None:
    """12 steps in three stages take 12 forwards, 12 optimizer steps, and what is trained never grows."""
    counts = []
    for recipe in (rankwise.catalog.cola(rank=RANK, interval=4), rankwise.catalog.lora(rank=RANK)):
        model = layer_model(normal(0, M, N))
        handle = rankwise.adapt_(model, rankwise.compose(recipe, "adamw"), seed=1)
        optimizer, forwards, sizes = handle.optimizer(0.01), list[int](), set[int]()
        model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        for t in range(12):
            one_step(model, handle, optimizer, t)
            sizes.add(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
            assert handle.trained_numbers == RANK * (M + N)
        counts.append((len(forwards), handle.step_count, sizes))
    assert counts[0] == counts[1]
    assert counts[0] == (12, 12, {RANK * (M + N)})


@pytest.mark.parametrize("ranks", [None, [1]])
def test_6_every_stage_has_a_fresh_optimizer(ranks: list[int] | None) -> None:
    """The first step of AdamW after a knot is its first step of all: η for every entry of B, whatever the gradient was."""
    lr = 0.01
    model, handle, optimizer = begin(lr=lr, step="adamw", ranks=ranks)
    for t in range(12):
        one_step(model, handle, optimizer, t)
        block = handle.blocks()[SITE]
        if t % 4 == 0:
            assert float((block["B"].detach().abs() / lr - 1).abs().max()) < 1e-4
        for tensor in block.values():
            state = optimizer.state.get(tensor, {})
            moments = [value for value in state.values() if isinstance(value, Tensor) and value.shape == tensor.shape]
            if t % 4 == 3:
                assert not any(value.any() for value in moments)
            else:
                assert len(moments) == 2
                assert t % 4 == 0 or all(value.any() for value in moments)  # at B = 0 the gradient of A is zero
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert known == {id(p) for p in handle.blocks()[SITE].values()}


def test_7_the_loss_never_rises_across_knots() -> None:
    model, handle, optimizer = begin(lr=0.05)
    x, goal = normal(5, 30, N), normal(6, M, N)
    losses = []
    for _ in range(40):
        losses.append(float(handle.backward(lambda: ((model(x) - x @ goal.T) ** 2).mean())))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
