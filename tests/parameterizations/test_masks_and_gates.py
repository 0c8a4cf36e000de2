"""CapaBoost's masks, and Fast LoRA's gates: options, limits, what files keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from tests.contract.subjects import LINEAR, inputs_of, model_of, scatter


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()


def masks_of(text: str, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    handle = rankwise.adapt_(network() if model is None else model, rankwise.compose(text), where=["0"])
    return {name: getattr(handle.parameterization("0"), name) for name in ("mask_A", "mask_B")}


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77, 1.0])
def test_a_mask_has_exactly_the_ones_it_should(density: float) -> None:
    for mask in masks_of(f"capaboost(rank=3, branches=4, density={density})").values():
        assert mask.dtype is torch.bool and len(mask) == 4
        assert mask.flatten(1).sum(1).tolist() == [int(density * mask[0].numel() + 1e-12)] * 4
        if density < 1:
            assert len({tuple(branch.flatten().tolist()) for branch in mask}) == 4, "branches differ"


def test_two_of_every_four_are_kept() -> None:
    for mask in masks_of("capaboost(rank=4, masks='nm', branches=3)").values():
        assert torch.all(mask.flatten(1).view(3, -1, 4).sum(2) == 2)
    with pytest.raises(RecipeError, match="multiple of 4"):
        rankwise.adapt_(nn.Sequential(nn.Linear(6, 6)), rankwise.compose("capaboost(rank=1, masks='nm')"))


def test_masks_differ_between_layers_and_seeds_and_survive_a_file(tmp_path: Path) -> None:
    square = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    handle = rankwise.adapt_(square, rankwise.compose("capaboost(rank=2)"))
    scatter(handle)
    one, other = (handle.parameterization(site).mask_A for site in ("0", "1"))
    assert not torch.equal(one, other)
    handle.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    fresh.load_state_dict({key: value for key, value in square.state_dict().items() if "adapter" not in key})
    loaded = rankwise.load_(fresh, tmp_path)
    assert torch.equal(loaded.parameterization("0").mask_A, one)
    again = rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose("capaboost(rank=2)"), seed=1)
    assert not torch.equal(again.parameterization("0").mask_A, one)


def test_the_rank_is_that_of_the_branches_and_the_export_is_exact() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).double()
    handle = rankwise.adapt_(model, rankwise.compose("capaboost(rank=2, branches=3)"))
    scatter(handle)
    pair = handle.low_rank_of("0")
    assert pair is not None and pair.rank == 6
    assert torch.linalg.matrix_rank(handle.update_of("0").dense()) == 6
    assert handle.trained_numbers == 2 * 32


def trajectory(text: str) -> list[torch.Tensor]:
    net = network()
    handle = rankwise.adapt_(net, rankwise.compose(text))
    optimizer, x = handle.optimizer(lr=1e-2), torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8)
    outputs = []
    for _ in range(5):
        outputs.append(net(x).detach())
        net(x).square().sum().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return outputs


def test_one_full_branch_trains_like_lora_and_d_of_them_like_d_times_its_scale() -> None:
    for branches in (1, 3):
        mine = trajectory(f"capaboost(rank=2, alpha=4, branches={branches}, density=1.0)")
        for one, other in zip(mine, trajectory(f"lora(rank=2, alpha={4 * branches})"), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "text",
    [
        "capaboost(masks='random')",
        "capaboost(branches=0)",
        "capaboost(density=0.0)",
        "capaboost(density=1.5)",
        "capaboost(dropout=1.0)",
        "batched_flora(mode='add')",
    ],
)
def test_unknown_options_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError):
        rankwise.adapt_(network(), rankwise.compose(text))


def test_gates_of_rank_one_are_gains_on_both_sides() -> None:
    model = model_of(LINEAR)
    handle = rankwise.adapt_(model, rankwise.compose("batched_flora"), where=["layer"])
    scatter(handle)
    B, A = (handle.blocks()["layer"][role] for role in "BA")
    x, layer = inputs_of(LINEAR), model_of(LINEAR).layer
    torch.testing.assert_close(model(x), (x * A[0]) @ layer.weight.t() * B[:, 0] + layer.bias)


def test_gates_start_with_noise_that_does_nothing_and_everything_learns() -> None:
    model = model_of(LINEAR)
    handle = rankwise.adapt_(model, rankwise.compose("batched_flora(rank=3)"), where=["layer"])
    B, A = (handle.blocks()["layer"][role] for role in "BA")
    assert torch.equal(B @ A, torch.ones(12, 8, dtype=B.dtype))
    assert B[:, 1:].any() and not A[1:].any()
    model(inputs_of(LINEAR)).square().sum().backward()
    assert A.grad is not None and A.grad.any(1).all(), "each row of A leaves zero"


def test_the_residual_form_adds_to_the_layer() -> None:
    model = model_of(LINEAR)
    handle = rankwise.adapt_(model, rankwise.compose("batched_flora(rank=2, mode='residual', alpha=6)"), where=["layer"])
    scatter(handle)
    B, A = (handle.blocks()["layer"][role] for role in "BA")
    W = model_of(LINEAR).layer.weight
    torch.testing.assert_close(handle.update_of("layer").dense(), 3.0 * W * (B @ A))


def test_gates_of_an_embedding_form_no_table() -> None:
    """The tokens of a batch are looked up in both factors; the table is as long as the vocabulary."""
    model = nn.Sequential(nn.Embedding(1000, 8)).double()
    rankwise.adapt_(model, rankwise.compose("batched_flora(rank=2)"), where=["0"])
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in held:
                made.append(result.numel())
            return result

    held = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    with Sizes():
        model(torch.arange(5))
    assert max(made) <= 5 * 8
