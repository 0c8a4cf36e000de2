"""EigenLoRAx: earlier adapters from real folders, exactly held where the subspace is wide enough, and refusals that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise
from rankwise.core.errors import CheckpointError, FingerprintError, RecipeError
from tests.contract.subjects import scatter

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)).double()


def folders(path: Path, *texts: str) -> tuple[list[str], list[rankwise.Handle]]:
    made, handles = [], []
    for k, text in enumerate(texts):
        handle = rankwise.adapt_(mlp(), rankwise.compose(text), seed=k)
        scatter(handle, 10 + k)
        made.append(str(handle.save(path / str(k))))
        handles.append(handle)
    return made, handles


SOURCES = ("lora(rank=2, alpha=6)", "rslora(rank=2)", "vera(rank=2)", "tied_lora(rank=2)")


@pytest.mark.parametrize("center", [True, False])
def test_every_earlier_adapter_is_held_exactly_when_the_subspace_is_wide_enough(center: bool, tmp_path: Path) -> None:
    sources, handles = folders(tmp_path, *SOURCES)
    components = 2 * len(SOURCES) - center
    recipe = rankwise.catalog.eigenlorax(adapters=sources, rank=2, components=components, random_components=1, center=center)
    model = mlp()
    expected = model(X)
    handle = rankwise.adapt_(model, recipe)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    for site in handle.targets:
        entry = handle.parameterization(site)
        for basis in (entry.basis_A, entry.basis_B):
            torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
        for source in handles:
            wanted = source.update_of(site)
            factors = source.low_rank_of(site)
            assert factors is not None
            entry.project_(factors)
            torch.testing.assert_close(entry.update().dense(), wanted.dense(), rtol=1e-10, atol=1e-10)


def test_a_loaded_adapter_needs_no_sources(tmp_path: Path) -> None:
    sources, _ = folders(tmp_path / "sources", *SOURCES[:2])
    model = mlp()
    handle = rankwise.adapt_(model, rankwise.catalog.eigenlorax(adapters=sources, rank=2, components=3))
    scatter(handle)
    handle.save(tmp_path / "new")
    for source in sources:
        (Path(source) / "adapter.json").unlink()
    fresh = mlp()
    rankwise.load_(fresh, tmp_path / "new")
    assert torch.equal(fresh(X), model(X))


def test_every_kind_of_layer_knows_its_base(tmp_path: Path) -> None:
    """The weight is compared as the layer holds it: a kernel with its modes, a table and a Conv1D turned."""

    def net(seed: int) -> nn.ModuleDict:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = {"conv": nn.Conv2d(4, 6, 3, groups=2), "table": nn.Embedding(9, 6), "turned": Conv1D(6, 8)}
            return nn.ModuleDict(made).double()

    handle = rankwise.adapt_(net(0), rankwise.catalog.lora(rank=2), where=["conv", "table", "turned"])
    scatter(handle)
    folder = str(handle.save(tmp_path))
    for site in handle.targets:
        recipe = rankwise.catalog.eigenlorax(adapters=[folder], rank=2, components=2, center=False)
        entry = rankwise.adapt_(net(0), recipe, where=[site]).parameterization(site)
        factors = handle.low_rank_of(site)
        assert factors is not None
        entry.project_(factors)
        torch.testing.assert_close(entry.update().dense(), handle.update_of(site).dense())
        with pytest.raises(FingerprintError, match=f"the weight of {site} differs"):
            rankwise.adapt_(net(1), recipe, where=[site])


def test_refusals_name_the_way_out(tmp_path: Path) -> None:
    sources, _ = folders(tmp_path, "lora(rank=2)", "dora(rank=2)")
    with pytest.raises(RecipeError, match=r"(?s)1 adapters have 1 directions here.*components=1"):
        rankwise.adapt_(mlp(), rankwise.catalog.eigenlorax(adapters=sources[:1], rank=2, components=4))
    with pytest.raises(RecipeError, match="directions"):
        rankwise.adapt_(mlp(), rankwise.catalog.eigenlorax(rank=2))
    with pytest.raises(RecipeError, match=r"1 to min\(m, n\) = 12 directions"):
        rankwise.adapt_(mlp(), rankwise.catalog.eigenlorax(rank=2, random_components=13))
    with pytest.raises(CheckpointError, match="has no factors"):
        rankwise.adapt_(mlp(), rankwise.catalog.eigenlorax(adapters=sources[1:], rank=2, components=1))
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"rankwise\.interop\.from_peft"):
        rankwise.adapt_(mlp(), rankwise.catalog.eigenlorax(adapters=[str(peft)], rank=2, components=1))
    with pytest.raises(FingerprintError, match="trained on another base: the weight of 0 differs"):
        rankwise.adapt_(mlp(seed=1), rankwise.catalog.eigenlorax(adapters=sources[:1], rank=2, components=1))
    narrow = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16)).double()
    with pytest.raises(FingerprintError, match="0 is 12×16 there and 8×16 here"):
        rankwise.adapt_(narrow, rankwise.catalog.eigenlorax(adapters=sources[:1], rank=2, components=1))
    with pytest.raises(CheckpointError, match=r"does not adapt '1\.0'"):
        rankwise.adapt_(
            nn.Sequential(nn.Tanh(), mlp()), rankwise.catalog.eigenlorax(adapters=sources[:1], rank=2, components=1)
        )
