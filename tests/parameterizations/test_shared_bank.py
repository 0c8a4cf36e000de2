"""VeRA: one bank, seen through views, kept by copies, checked on loading."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError
from tests.contract.subjects import scatter


class TwoSizes(nn.Module):
    """Two layers of different shape, 20 -> 100 and 50 -> 80."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 100), nn.Linear(50, 80)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x[:, :20]).sum(1, keepdim=True) + self.second(x)


X = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))


def adapted(text: str = "vera(rank=6)", seed: int = 0) -> tuple[TwoSizes, rankwise.Handle]:
    model = TwoSizes()
    return model, rankwise.adapt_(model, rankwise.compose(text), seed=seed)


def test_the_bank_has_the_largest_sizes_and_layers_see_views() -> None:
    model, handle = adapted()
    bank = handle.bank
    assert bank["A"].shape == (6, 50) and bank["B"].shape == (100, 6)
    for site in ("first", "second"):
        B, A = handle.parameterization(site).projections()
        assert A.data_ptr() == bank["A"].data_ptr() and B.data_ptr() == bank["B"].data_ptr()
        assert (B.shape[0], A.shape[1]) == (handle.targets[site].m, handle.targets[site].n)
    assert not [key for key in model.state_dict() if "bank" in key], "a seeded bank is not stored"


def test_bounds_are_those_of_gain_root_two() -> None:
    _, handle = adapted("vera(rank=64)")
    for name, fan_in in (("A", 50), ("B", 64)):
        bound = (6 / fan_in) ** 0.5
        values = handle.bank[name]
        assert values.abs().max() <= bound
        assert abs(values.std().item() - bound / 3**0.5) < 0.03 * bound


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    first = adapted(seed=3)[1].bank["A"]
    torch.manual_seed(2)
    assert torch.equal(first, adapted(seed=3)[1].bank["A"])
    assert not torch.equal(first, adapted(seed=4)[1].bank["A"])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_share_among_themselves(copied: str) -> None:
    model, handle = adapted()
    scatter(handle)
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    bank = other.rankwise_banks["default"]
    for layer in (other.first, other.second):
        assert layer.adapter["default"].bank is bank
    assert bank["A"].data_ptr() != handle.bank["A"].data_ptr()
    assert torch.equal(other(X), model(X))
    with torch.no_grad():
        bank["B"].zero_()
    assert not torch.equal(other(X), model(X))


def test_moves_keep_the_sharing() -> None:
    model, handle = adapted()
    model.double()
    assert handle.bank["A"].dtype is torch.float64
    assert handle.parameterization("first").projections()[1].data_ptr() == handle.bank["A"].data_ptr()
    assert model(X.double()).dtype is torch.float64


def test_an_nn_sequential_still_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    rankwise.adapt_(model, rankwise.compose("vera(rank=2)"))
    torch.testing.assert_close(model(x), expected)


def test_another_bank_is_refused_on_loading(tmp_path: Path) -> None:
    _, handle = adapted()
    handle.save(tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    description["bank"]["digest"] = "0" * 32
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="shared tensors"):
        rankwise.load_(TwoSizes(), tmp_path)


def test_stored_projections_come_back_whatever_is_drawn(tmp_path: Path) -> None:
    model, handle = adapted("vera(rank=6, save_projections=True)")
    scatter(handle)
    with torch.no_grad():
        handle.bank["A"].mul_(0.5)
    handle.save(tmp_path)
    fresh = TwoSizes()
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize(("train", "roles"), [("both", {"b", "d"}), ("b", {"b"}), ("d", {"d"})])
@pytest.mark.parametrize("share", [True, False])
def test_ablations_start_at_the_base_and_come_back_from_a_file(
    train: str, roles: set[str], share: bool, tmp_path: Path
) -> None:
    expected = TwoSizes()(X)
    model, handle = adapted(f"vera(rank=6, train='{train}', share={share})")
    torch.testing.assert_close(model(X), expected)
    assert set(handle.blocks()["first"]) == handle.recipe.roles == roles
    scatter(handle)
    assert not torch.allclose(model(X), expected)
    handle.save(tmp_path)
    fresh = TwoSizes()
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    with torch.no_grad():
        handle.parameterization("first").restart(None)
        handle.parameterization("second").restart(None)
    torch.testing.assert_close(model(X), expected)


def test_pairs_of_its_own_differ_between_layers() -> None:
    _, handle = adapted("vera(rank=6, share=False)")
    assert handle.bank is None
    first, second = (handle.parameterization(site).projections()[1] for site in ("first", "second"))
    assert not torch.equal(first, second[:, :20])


def test_unknown_vectors_are_refused() -> None:
    with pytest.raises(ArgumentError, match="both, d or b"):
        adapted("vera(rank=2, train='c')")
