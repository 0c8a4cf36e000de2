"""Silent errors of sparse and freezing methods (sltrain, roselora, aflora). Tests are named by their number in the list."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from tests.core.training import Regression, assert_same_bits, numbers
from tests.never_silent.models import adapted, inputs, mlp

ROSELORA = "roselora(rank=3, keep=0.4, begin=1, end=8)"
AFLORA = "aflora(rank=3, total_steps=12, epochs=12, warmup_epochs=1, final_epochs=4, interval=2)"
SLOW = "aflora(rank=3, total_steps=40, epochs=40, warmup_epochs=1, final_epochs=4, interval=2)"


@pytest.mark.parametrize("keep_base", [True, False])
def test_07_only_what_says_so_starts_away_from_the_base(keep_base: bool) -> None:
    net, base, x = mlp(), mlp(), inputs()
    handle = rankwise.adapt_(net, rankwise.compose(f"sltrain(rank=2, density=0.2, keep_base={keep_base})"))
    assert torch.equal(net(x), base(x)) is keep_base is handle.recipe.method.facts.starts_at_base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_23_merging_a_replaced_weight_and_taking_it_out_brings_the_base_back_to_the_bit(dtype: torch.dtype) -> None:
    net = mlp(dtype=dtype)
    before = [layer.weight.clone() for layer in net]
    handle = adapted(net, "sltrain(rank=2, density=0.2)")
    for _ in range(3):
        handle.merge_()
        assert not any(torch.equal(layer.weight, weight) for layer, weight in zip(net, before, strict=True))
        handle.unmerge_()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(net, before, strict=True))


@pytest.mark.parametrize("text", [ROSELORA, AFLORA, SLOW, f"{ROSELORA} + sam(rho=0.01)", f"{AFLORA} + sam(rho=0.01)"])
@pytest.mark.parametrize("at", [3, 5, 9])
def test_34_resuming_in_the_middle_continues_to_the_bit(text: str, at: int, tmp_path: Path) -> None:
    straight = Regression()
    handle = straight.adapt(text)
    optimizer = handle.optimizer(lr=0.05, weight_decay=0.1)
    straight.train(handle, optimizer, at)
    handle.save(tmp_path / "adapter")
    torch.save([handle.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    straight.train(handle, optimizer, 14 - at, first=at)

    resumed = Regression()
    again = rankwise.load_(resumed.model, tmp_path / "adapter")
    other = again.optimizer(lr=0.05, weight_decay=0.1)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    resumed.train(again, other, 14 - at, first=at)
    assert_same_bits(numbers(handle), numbers(again))
    for site in handle.targets:
        assert torch.equal(handle.update_of(site).dense(), again.update_of(site).dense())
    assert_same_state(handle.schedule.state_dict(), again.schedule.state_dict())


def assert_same_state(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key, value in one.items():
            assert_same_state(value, other[key])
    elif isinstance(one, tuple):
        for mine, theirs in zip(one, other, strict=True):  # type: ignore[call-overload]
            assert_same_state(mine, theirs)
    else:
        assert one == other


@pytest.mark.parametrize("text", [ROSELORA, AFLORA])
def test_34_without_the_schedules_state_a_resumed_run_goes_elsewhere(text: str, tmp_path: Path) -> None:
    """The test above can fail."""
    straight = Regression()
    handle = straight.adapt(text)
    optimizer = handle.optimizer(lr=0.05)
    straight.train(handle, optimizer, 9)
    handle.save(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    straight.train(handle, optimizer, 1, first=9)
    resumed = Regression()
    again = rankwise.load_(resumed.model, tmp_path)
    other = again.optimizer(lr=0.05)
    other.load_state_dict(state)
    resumed.train(again, other, 1, first=9)
    mine, theirs = ({site: h.update_of(site).dense() for site in h.targets} for h in (handle, again))
    assert any(not torch.equal(mine[site], theirs[site]) for site in mine)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROSELORA, "no entry was pruned in 1 steps; the share keep=0.4 is reached at step 8"),
        ("roselora(rank=2, keep=0.95, begin=1, end=2)", "no entry was pruned in 1 steps"),
        (AFLORA, "no projections were frozen in 1 steps; the last are due at 9"),
    ],
)
def test_43_a_schedule_that_did_nothing_says_so(text: str, said: str) -> None:
    problem = Regression()
    handle = problem.adapt(text)
    problem.train(handle, handle.optimizer(lr=0.05), 1)
    assert said in (handle.unfinished() or "") and said in handle.coverage()


def test_43_a_run_cut_short_says_how_far_it_came() -> None:
    problem = Regression()
    handle = problem.adapt(ROSELORA)
    problem.train(handle, handle.optimizer(lr=0.05), 5)
    zeros = sum(int((tensor == 0).sum()) for tensor in numbers(handle).values())
    assert zeros and f"{zeros} entries were pruned in 5 steps" in (handle.unfinished() or "")
    problem = Regression()
    handle = problem.adapt(SLOW)
    problem.train(handle, handle.optimizer(lr=0.05), 8)
    frozen = sum(len({"A", "B"} - set(block)) for block in handle.blocks().values())
    assert 0 < frozen < 4 and f"{frozen} projections were frozen in 8 steps" in (handle.unfinished() or "")


def test_43_layers_too_narrow_to_prune_or_with_nothing_to_freeze_are_reported_at_the_end() -> None:
    problem = Regression()
    handle = problem.adapt("roselora(rank=2, keep=0.95, begin=1, end=3)")
    problem.train(handle, handle.optimizer(lr=0.05), 6)
    assert "too narrow for keep=0.95" in (handle.unfinished() or "")
    net = mlp()  # square layers only
    handle = rankwise.adapt_(net, rankwise.compose(AFLORA))
    optimizer = handle.optimizer(lr=0.05)
    for _ in range(12):
        net(inputs()).square().sum().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert "no projection was there to freeze" in (handle.unfinished() or "")


@pytest.mark.parametrize("text", [ROSELORA, AFLORA])
def test_43_a_schedule_that_is_through_says_nothing(text: str) -> None:
    problem = Regression()
    handle = problem.adapt(text)
    problem.train(handle, handle.optimizer(lr=0.05), 12)
    assert handle.unfinished() is None and "unfinished" not in handle.coverage()


def test_43_frozen_tensors_lose_their_moments_and_do_not_move_by_weight_decay() -> None:
    problem = Regression()
    handle = problem.adapt(AFLORA)
    optimizer = handle.optimizer(lr=0.05, weight_decay=0.5)
    seen: dict[str, Tensor] = {}
    for step in range(14):
        problem.train(handle, optimizer, 1, first=step)
        for site in handle.targets:
            for role in "AB":
                tensor = handle.parameterization(site).get_parameter(role)
                if tensor.requires_grad:
                    assert optimizer.state[tensor]
                    continue
                assert tensor not in optimizer.state and tensor.grad is None
                assert torch.equal(tensor, seen.setdefault(f"{site}.{role}", tensor.detach().clone()))
    assert len(seen) == 4
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert held == 2 * handle.trained_numbers


def test_47_a_replaced_weight_keeps_no_more_for_backward_than_lora() -> None:
    kept = {}
    for text in ("lora(rank=2)", "sltrain(rank=2, density=0.1)", "sltrain(rank=2, density=0.1, keep_base=True)"):
        net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
        adapted(net, text)
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
        found: dict[int, int] = {}

        def note(tensor: Tensor, weights: set[int] = weights, found: dict[int, int] = found) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = net(x)
        kept[text] = sum(found.values())
        assert y.shape == (16, 20)
    lora, *others = kept.values()
    assert max(others) <= lora


@pytest.mark.parametrize("keep_base", [True, False])
def test_48_a_file_holds_what_is_trained_and_where_it_is(keep_base: bool, tmp_path: Path) -> None:
    layers = 4
    handle = adapted(mlp(layers), f"sltrain(rank=2, density=0.25, keep_base={keep_base})")
    size = next(handle.save(tmp_path).glob("*.safetensors")).stat().st_size
    places = layers * 16 * 2 * 4  # int32 rows and columns
    assert handle.trained_numbers == layers * (2 * 16 + 16)
    assert size <= handle.trained_numbers * 8 + places + 200 * 4 * layers
