"""SST: gradients, sampling, what moves and what stays, decompositions, moments, the warm-up, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.parameterizations.sampled_triplets import sampled
from rankwise.procedures.sst import probabilities
from rankwise.steps.warmup import restarting_warmup
from tests.procedures.quadratic import Quadratic, drawn


def value_of(entry) -> torch.Tensor:  # type: ignore[no-untyped-def]
    U, V = entry.U.clone(), entry.V.clone()
    U[:, entry.active], V[:, entry.active] = entry.U_active.detach(), entry.V_active.detach()
    return (U * entry.S.detach()) @ V.T


def test_gradients_on_a_real_convolution() -> None:
    """uᵀG v for every value, G v and Gᵀu for the sampled vectors: the true ones over S_i."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, dense = (nn.Conv2d(4, 6, 3, stride=2, padding=1).double() for _ in range(2))
    model, x = nn.Sequential(layer), drawn(0, 2, 4, 7, 7)
    handle = rankwise.adapt_(model, rankwise.compose("sst(rank=2)"), where=["0"])
    entry = handle.parameterization("0")
    torch.testing.assert_close(model(x), layer(x), rtol=0, atol=1e-13)
    with torch.no_grad():
        entry.U_active.add_(drawn(1, 6, 2) * 0.1)
        entry.S[entry.active[0]] = 0.0  # even there the vectors learn
        dense.weight.copy_(value_of(entry).view_as(dense.weight))
        dense.bias.copy_(layer.bias)
    y, expected = model(x), dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g_y = drawn(2, *y.shape)
    y.backward(g_y)
    expected.backward(g_y)
    G = dense.weight.grad.flatten(1)
    U, V = entry.U.clone(), entry.V.clone()
    U[:, entry.active] = entry.U_active.detach()
    torch.testing.assert_close(entry.S.grad, ((G @ V) * U).sum(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(entry.U_active.grad, G @ entry.V_active.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(entry.V_active.grad, G.T @ entry.U_active.detach(), rtol=1e-11, atol=1e-11)


def test_descent_to_first_order() -> None:
    problem = Quadratic("sst(rank=3, warmup=0) + sgd", drawn(0, 9, 7), lr=1e-6)
    entry, before = problem.entry, problem.matrix()
    G = before - problem.target
    U, V, S = entry.U_active.detach(), entry.V_active.detach(), entry.S.detach()[entry.active]
    g_S = ((G @ entry.V) * entry.U).sum(0)
    along = g_S[entry.active]
    vectors = S * ((G @ V).square().sum(0) + (G.T @ U).square().sum(0) - 2 * along.square())
    problem.step()
    change = ((problem.matrix() - before) * G).sum() / 1e-6
    torch.testing.assert_close(change, -(g_S.square().sum() + vectors.sum()), rtol=1e-4, atol=0)
    assert float(change) < 0


def test_what_moves_within_an_interval_and_at_its_end() -> None:
    problem = Quadratic("sst(rank=2, interval=3, warmup=0, iterations=2)", drawn(0, 9, 7), lr=0.05)
    entry, state = problem.entry, problem.optimizer.state
    active, U, V = entry.active.clone(), entry.U.clone(), entry.V.clone()
    idle = torch.ones(7, dtype=torch.bool).index_fill(0, active, False)
    for count in range(1, 13):
        problem.step()
        assert float((entry.U_active.norm(dim=0) - 1).abs().max()) < 1e-14
        assert float(entry.S.detach().min()) >= 0
        assert torch.equal(entry.U[:, entry.active], entry.U_active)
        if count % 6 == 0:  # decomposed anew
            assert float((entry.U.T @ entry.U - torch.eye(7)).abs().max()) < 1e-13
            assert not any(state.values())
        elif count % 3 == 0:  # others are sampled; those that stay idle are as they were
            assert not state.get(entry.U_active) and not state.get(entry.V_active)
            assert float(state[entry.S]["adamw.step"]) % 6 == 3
        else:
            assert float(state[entry.U_active]["adamw.step"]) == count % 3
            assert torch.equal(entry.active, active)
            assert torch.equal(entry.U[:, idle], U[:, idle]) and torch.equal(entry.V[:, idle], V[:, idle])
        if count % 3 == 0:
            active, U, V = entry.active.clone(), entry.U.clone(), entry.V.clone()
            idle = torch.ones(7, dtype=torch.bool).index_fill(0, active, False)


@pytest.mark.parametrize("text", ["sst(rank=2, interval=1, warmup=0)", "sst(rank=2, interval=1, warmup=0, iterations=1)"])
def test_sampling_and_decomposing_leave_the_weight(text: str) -> None:
    """With nothing to learn from, seven rounds of either leave it where it was, and the active sets differ."""
    problem = Quadratic(text, drawn(0, 9, 7), weight=drawn(0, 9, 7), lr=1e-30)
    before, sets = problem.matrix(), set()
    for _ in range(7):
        problem.step()
        sets.add(tuple(problem.entry.active.tolist()))
        torch.testing.assert_close(problem.matrix(), before, rtol=0, atol=1e-13)
    assert len(sets) > 1 and all(len(set(chosen)) == 2 for chosen in sets)


def test_sampling_follows_the_probabilities() -> None:
    S = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0]).double()
    p = probabilities(S)
    torch.testing.assert_close(p, torch.tensor([0.35, 0.225, 0.1625, 0.1625, 0.1]).double())
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([sampled(S, 1, generator) for _ in range(20000)]).flatten().bincount(minlength=5) / 20000
    assert float((counts - p).abs().max()) < 4.5 * (0.25 / 20000) ** 0.5
    torch.testing.assert_close(probabilities(torch.zeros(4)), torch.full((4,), 0.25).double())


def test_default_rounds_follow_the_size_of_each_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)).double()
    handle = rankwise.adapt_(model, rankwise.compose("sst(rank=3, interval=2, warmup=1)"))
    decided = {step: handle.procedure.decide(step, handle.blocks(), learning_rate=0.1) for step in range(12)}  # type: ignore[union-attr]
    found = {site: [step + 1 for step, kept in decided.items() if kept[site].what == "resvd"] for site in ("0", "1")}
    assert found == {"0": [6, 12], "1": [4, 8, 12]}


def test_the_rise_begins_again() -> None:
    step = restarting_warmup(interval=4, warmup=2)
    block = {"S": torch.ones(1), "U_active": torch.ones(1)}
    state = step.init(block)
    seen = []
    for count in range(9):
        found = step.update(block, state, block)
        seen.append((float(found["S"]), float(found["U_active"])))
        if count == 3:
            state["U_active"] = step.init(block)["U_active"]
    expected = [1 / 3, 2 / 3, 1.0, 1.0, 1 / 3, 2 / 3, 1.0, 1.0, 1 / 3]
    assert [pair[0] for pair in seen] == pytest.approx(expected) and seen == [(a, a) for a, _ in seen]


def test_all_at_once_reaches_a_full_rank_target() -> None:
    problem = Quadratic("sst(rank=7, interval=20, warmup=0, iterations=1) + sgd", drawn(0, 9, 7), lr=0.2)
    losses = [problem.step() for _ in range(300)]
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize(
    "text", ["sst(interval=0)", "sst(rank=2, iterations=0)", "sst(rank=2, interval=5, warmup=5)", "sst(rank=2, warmup=-1)"]
)
def test_refusals(text: str) -> None:
    with pytest.raises(ArgumentError):
        Quadratic(text, drawn(0, 9, 7))
