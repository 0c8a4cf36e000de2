"""The list of silent errors, for tensor trains, Khatri-Rao products and looped layers. Tests are named by their number."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import CheckpointError, StatisticsError, TargetError
from rankwise.procedures.looped_model import RelaxedRecursive
from tests.interop.models import llama, tokens
from tests.never_silent.models import adapted, inputs, mlp

relaxed_recursive = rankwise.catalog.relaxed_recursive
METHODS = ["dota(rank=2)", "dota(rank=2, balanced=True)", "lowrank_tales"]


def decoder(layers: int = 4) -> nn.Module:
    return llama(layers).double().eval()


@pytest.mark.parametrize("recipe", METHODS)
def test_15_the_first_output_of_a_half_precision_base_is_that_base_to_the_bit(recipe: str) -> None:
    net = mlp(dtype=torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    expected = net(x)
    rankwise.adapt_(net, rankwise.compose(recipe))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("recipe", METHODS)
def test_53_a_step_too_small_for_the_weights_precision_still_moves_the_output(recipe: str) -> None:
    """With W - MPO(T⁰) kept in bfloat16 such an increment would drown in the rounding of the two parts."""
    net = mlp(layers=1, dtype=torch.bfloat16)
    handle = adapted(net, recipe)
    with torch.no_grad():
        for site, block in handle.blocks().items():
            entry = handle.parameterization(site)
            for role, tensor in block.items():
                start = getattr(entry, role.replace("core", "start"), torch.zeros_like(tensor))
                tensor.copy_(start + 1e-3 * (tensor - start) if role.startswith("core") else 0.02 * tensor)
    x = inputs()
    layer: nn.Linear = net[0]  # type: ignore[assignment]
    exact = x @ handle.update_of("0").dense().double().t()
    update = handle.parameterization("0").update().apply(x.bfloat16(), layer.adapter.layout).double()
    assert (update - exact).norm() < 0.02 * exact.norm()


def test_13_weights_shared_over_depths_take_no_adapter_that_would_be_merged_into_all_of_them() -> None:
    relaxed = relaxed_recursive(decoder(), rank=2)
    before = {name: tensor.clone() for name, tensor in relaxed.model.state_dict().items()}
    for recipe in ("lora(rank=2)", "dora(rank=2)", "dota(rank=2)"):
        for where in ("all-linear", ["model.layers.0.mlp.up_proj"]):
            with pytest.raises(TargetError, match="unroll_"):
                rankwise.adapt_(relaxed.model, rankwise.compose(recipe), where=where)
    assert all(torch.equal(tensor, before[name]) for name, tensor in relaxed.model.state_dict().items())


def test_13_a_head_tied_to_the_embedding_stays_tied(tmp_path: Path) -> None:
    model = llama(4, tie_word_embeddings=True).double().eval()
    relaxed = relaxed_recursive(model, rank=2)
    relaxed.save(tmp_path)
    other = llama(4, seed=5, tie_word_embeddings=True).double().eval()
    RelaxedRecursive.load(other, tmp_path)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_24_a_weight_with_nan_is_refused_before_anything_changes() -> None:
    model = decoder()
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StatisticsError, match="NaN"):
        relaxed_recursive(model, rank=2)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in model.state_dict().items())


def test_32_a_file_with_too_much_or_too_little_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from rankwise.core import checkpoint

    relaxed_recursive(decoder(), rank=2).save(tmp_path)
    description, tensors = checkpoint.read(tmp_path)
    name = "model.layers.3.mlp.up_proj.relaxation.A"
    assert name in tensors
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, "1 places got no tensor"),
        ({**tensors, "stray": torch.zeros(1)}, "stray"),
        ({**tensors, name: torch.zeros(1, 16)}, r"\(1, 16\) in the file"),
    ):
        checkpoint.write(tmp_path / "other", description, changed)
        model = decoder()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=message):
            RelaxedRecursive.load(model, tmp_path / "other")
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    (file,) = tmp_path.glob("*.safetensors")
    damaged = load_file(file)
    damaged[name] = damaged[name] + 1
    save_file(damaged, file)
    with pytest.raises(CheckpointError, match="damaged"):
        RelaxedRecursive.load(decoder(), tmp_path)


def test_46_what_is_shared_without_factors_is_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 4, 4))
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.einsum("eij,...j->...i", self.experts, x))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Experts() for _ in range(4))

    relaxed = relaxed_recursive(Stack(), rank=4)
    assert relaxed.without_factors == ("experts",) and "shared without factors: experts" in repr(relaxed)
    assert relaxed_recursive(decoder(), rank=2).without_factors == ()


def test_48_a_checkpoint_holds_the_cores_and_their_start_and_nothing_of_the_weight(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    handle = adapted(net, "dota(rank=4)")
    handle.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert 4 * 2 * handle.trained_numbers <= file.stat().st_size <= 4 * 2 * handle.trained_numbers + 2000 < 4 * 64 * 64
