"""Mask, assign, resize, freeze and restart, with what they do to optimizer state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.bank import BANKS, Bank, attach_bank
from rankwise.core.decisions import _prune
from rankwise.core.errors import TrainingError
from rankwise.core.protocols import Assign, Freeze, Keep, Mask, Resize, Restart
from rankwise.schedules.sora import prune
from tests.core.training import Regression, numbers, open_gates

GATED = "gated_lora(rank=4, form='sora')"


def trained(text: str, steps: int = 3, **arguments):
    problem = Regression()
    handle = problem.adapt(text, **arguments)
    optimizer = handle.optimizer(lr=0.05)
    problem.train(handle, optimizer, steps)
    return problem, handle, optimizer


def test_mask_zeroes_gates_and_keeps_factors_and_moments() -> None:
    _, handle, optimizer = trained(GATED)
    before, moments = numbers(handle), len(optimizer.state)
    handle.apply_({"0": Mask(torch.tensor([True, False, True, False])), "2": Keep()})
    after = numbers(handle)
    assert (after["0.gate"] == 0).tolist() == [False, True, False, True]
    assert torch.equal(after["0.gate"][::2], before["0.gate"][::2])
    assert all(torch.equal(before[name], after[name]) for name in before if name != "0.gate")
    assert len(optimizer.state) == moments


def test_assign_keeps_the_parameter_and_its_state() -> None:
    _, handle, optimizer = trained(GATED)
    gate = handle.parameterization("0").roles()["gate"]
    handle.apply_({"0": Assign({"gate": torch.arange(4.0)})})
    assert handle.parameterization("0").roles()["gate"] is gate
    assert gate.tolist() == [0, 1, 2, 3]
    assert optimizer.state[gate]


def test_resize_goes_on_as_if_the_zero_ranks_had_never_been_there() -> None:
    """A rank whose A, B and gate are zero gets no gradient; cutting it, with its moments, must not change the run."""
    keep = torch.tensor([True, False, True, True])
    runs = []
    for cut in (False, True):
        problem, handle, optimizer = trained(GATED)
        with torch.no_grad():
            for site in handle.targets:
                roles = handle.parameterization(site).roles()
                roles["gate"][1] = roles["A"][1] = roles["B"][:, 1] = 0.0
                for role, dimension in (("gate", 0), ("A", 0), ("B", 1)):
                    for name, value in optimizer.state[roles[role]].items():
                        if value.dim() and "exp_avg" in name:
                            value.index_fill_(dimension, torch.tensor([1]), 0.0)
        scale = handle.parameterization("0").scale
        if cut:
            handle.apply_(dict.fromkeys(handle.targets, Resize(keep)))
            assert handle.parameterization("0").rank == 3
            assert handle.parameterization("0").scale == scale
        problem.train(handle, optimizer, 4, first=3)
        runs.append(({site: handle.update_of(site).dense().detach() for site in handle.targets}, optimizer))
    for site in runs[0][0]:
        torch.testing.assert_close(runs[0][0][site], runs[1][0][site], rtol=1e-12, atol=1e-14)
    assert len(runs[1][1].state) == 6  # no state of tensors that are gone
    assert all(p.shape[0 if p.dim() == 1 else p.shape.index(3)] == 3 for p in runs[1][1].param_groups[0]["params"])


def test_resize_to_nothing_trains_on_and_loads_again(tmp_path) -> None:
    problem, handle, optimizer = trained(GATED)
    handle.apply_({"0": Resize(torch.zeros(4, dtype=torch.bool)), "2": Resize(torch.tensor([True, False, False, True]))})
    problem.train(handle, optimizer, 2)
    assert not handle.update_of("0").dense().any()
    expected = problem.model(problem.batches[0][0]).detach()
    handle.save(tmp_path)
    fresh = Regression()
    again = rankwise.load_(fresh.model, tmp_path)
    assert [again.parameterization(site).rank for site in ("0", "2")] == [0, 2]
    assert again.parameterization("2").scale == handle.parameterization("2").scale
    torch.testing.assert_close(fresh.model(fresh.batches[0][0]), expected, rtol=0, atol=0)
    fresh.train(again, again.optimizer(lr=0.01), 1)


def test_state_that_belongs_to_the_old_directions_is_begun_again() -> None:
    problem, handle, optimizer = trained(GATED)
    A = handle.parameterization("0").roles()["A"]
    optimizer.state[A]["adamw.preconditioner"] = torch.eye(4, dtype=torch.float64)
    handle.apply_({"0": Resize(torch.tensor([True, True, False, True]))})
    new = handle.parameterization("0").roles()["A"]
    assert not optimizer.state.get(new)
    problem.train(handle, optimizer, 2, first=3)
    assert optimizer.state[new]["adamw.exp_avg"].shape == (3, 6)


def test_resize_inside_dora() -> None:
    problem, handle, optimizer = trained("dora(inner=gated_lora(rank=4, form='sora'))")
    handle.apply_({"0": Mask(torch.tensor([True, False, True, False]))})
    problem.model.eval()
    before = problem.model(problem.batches[0][0]).detach()
    assert prune(handle) == {"0": 2, "2": 4}
    torch.testing.assert_close(problem.model(problem.batches[0][0]), before, rtol=1e-12, atol=1e-12)
    problem.model.train()
    problem.train(handle, optimizer, 2, first=3)
    after = problem.model.eval()(problem.batches[0][0]).detach()
    assert not torch.equal(after, before)


def test_freeze_frees_state_and_stops_training() -> None:
    problem, handle, optimizer = trained("lora(rank=2)")
    A = handle.parameterization("0").roles()["A"]
    handle.apply_({"0": Freeze(frozenset({"A"}))})
    before = numbers(handle)
    kept = A.detach().clone()
    problem.train(handle, optimizer, 2, first=3)
    assert A not in optimizer.state
    assert torch.equal(A, kept)
    assert not torch.equal(numbers(handle)["0.B"], before["0.B"])


@pytest.mark.parametrize("moments", ["reset", 0.75])
def test_restart_keeps_the_function_and_prunes_moments(moments) -> None:
    problem, handle, optimizer = trained("lora(rank=2, dropout=0.4, alpha=6)")
    problem.model.eval()
    x = problem.batches[0][0]
    before, update = problem.model(x).detach(), handle.update_of("0").dense().detach()
    counter = float(optimizer.state[handle.parameterization("0").roles()["A"]]["adamw.step"])
    problem.model.train()  # the update is read without its dropout
    handle.apply_(dict.fromkeys(handle.targets, Restart(moments)))
    problem.model.eval()
    torch.testing.assert_close(problem.model(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(handle.update_of("0").dense(), update, rtol=1e-12, atol=1e-12)
    for role, tensor in handle.parameterization("0").roles().items():
        state = optimizer.state[tensor]
        assert float(state["adamw.step"]) == counter == 3
        assert bool(tensor.any()) == (role == "A")
        for name in ("adamw.exp_avg", "adamw.exp_avg_sq"):
            expected = 0 if moments == "reset" else round(0.25 * tensor.numel())
            assert int((state[name] != 0).sum()) == expected


def test_pruning_keeps_the_largest_by_magnitude() -> None:
    value = torch.tensor([[0.1, -5.0, 2.0], [-0.2, 3.0, 0.0]])
    _prune(value, 0.5)
    assert value.tolist() == [[0.0, -5.0, 2.0], [0.0, 3.0, 0.0]]


def test_restart_of_a_tied_weight_leaves_its_twin_alone() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    model = Tied().double()
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=2), where=["second"])
    open_gates(handle)
    weight, x = model.first.weight.clone(), torch.randn(3, 5, dtype=torch.float64)
    before = model(x).detach()
    for _ in range(3):
        handle.apply_({"second": Restart()})
        torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.first.weight, weight)


def test_restart_beside_a_merged_adapter_is_refused() -> None:
    problem = Regression()
    first = problem.adapt("lora(rank=2)")
    second = problem.adapt("lora(rank=2)", name="other")
    first.merge_()
    with pytest.raises(TrainingError, match="cannot be restarted"):
        second.apply_({"0": Restart()})


def test_what_is_carried_never_grows_beyond_the_matrix() -> None:
    problem, handle, _ = trained("lora(rank=3)", steps=1)
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(6):
        with torch.no_grad():
            B = handle.parameterization("0").roles()["B"]
            B.copy_(torch.randn(B.shape, generator=generator, dtype=torch.float64))
        total = handle.update_of("0").dense().detach()
        handle.apply_({"0": Restart()})
    carried = handle.parameterization("0").carried()
    assert carried.rank == 6  # min(m, n) of the 8 × 6 layer, not 18
    torch.testing.assert_close(handle.update_of("0").dense(), total, rtol=1e-11, atol=1e-11)
    assert problem.model[0].weight.dtype == torch.float64


def test_restart_in_bfloat16_does_not_lose_small_updates() -> None:
    """Sixty updates, each below half a rounding step of the weight, are all there in the end."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=1), where=["0"])
    for _ in range(60):
        with torch.no_grad():
            roles = handle.parameterization("0").roles()
            roles["A"].fill_(1.0)
            roles["B"].fill_(1e-3)
        handle.apply_({"0": Restart()})
    assert abs(float(model[0].weight.float().mean()) - 1.06) < 4e-3


def test_tensors_that_layers_share_are_assigned_and_frozen_by_the_name_of_their_group() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2)")
    shared = {name: nn.Parameter(torch.ones(2, 3, dtype=torch.float64)) for name in "AB"}
    attach_bank(problem.model, handle.name, Bank.grouped({"g": shared}))
    optimizer, site = handle.optimizer(lr=0.1), f"{BANKS}.{handle.name}.g"
    block = handle.blocks()[site]
    for tensor in block.values():
        tensor.grad = torch.ones_like(tensor)
    handle.after_backward()
    optimizer.step()
    handle.apply_({site: Assign({"A": torch.zeros(2, 3)})})
    assert not block["A"].any() and block["A"] in optimizer.state
    handle.apply_({site: Freeze(frozenset({"A"}))})
    assert set(handle.blocks()[site]) == {"B"} and block["A"].grad is None
    assert block["A"] not in optimizer.state and block["B"] in optimizer.state
