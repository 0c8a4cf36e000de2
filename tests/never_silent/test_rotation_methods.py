"""The list of silent errors where it concerns methods that multiply the weight. Tests are named by their number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, FingerprintError, RecipeError
from tests.contract.subjects import LAYERS, LayerKind, inputs_of, model_of
from tests.never_silent.models import adapted, inputs, mlp

CONVOLUTIONS = [kind for kind in LAYERS if kind.kind == "conv"]
ROTATIONS = ["oft(block=4)", "oft(block=4, cayley='neumann')", "boft(block=2, factors=2)", "hra(rank=4)"]
EVERY_ONE = [*ROTATIONS, "oft(block=4, side='output')", "ia3", "ia3(side='input')", "road(group=4)", "delora(rank=2)"]


@pytest.mark.parametrize("recipe", ROTATIONS)
@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=lambda kind: kind.name)
def test_01_a_rotation_of_nothing_is_the_base_on_a_convolution(kind: LayerKind, recipe: str) -> None:
    model, x = model_of(kind), inputs_of(kind)
    expected = model(x)
    handle = rankwise.adapt_(model, rankwise.compose(recipe), where=["layer"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # and elsewhere forward is what merging writes, overlapping patches and all
        for tensor in handle.blocks()["layer"].values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.3)
    turned = model(x)
    assert (turned - expected).norm() > 0.01 * expected.norm()
    handle.merge_()
    torch.testing.assert_close(model(x), turned)


@pytest.mark.parametrize(("first", "second"), [("oft(block=4)", "oft(block=2)"), ("hra(rank=4)", "oft(block=4)")])
def test_02_two_rotations_together_are_what_merging_both_writes(first: str, second: str) -> None:
    """Several adapters are the sum of their changes in any order, in forward and in the merged weight."""
    net = mlp()
    handles = [adapted(net, first, name="a", seed=2), adapted(net, second, name="b", seed=3)]
    rankwise.activate_(net, {"a": 1.0, "b": 1.0})
    expected = net(inputs())
    rankwise.activate_(net, {"b": 1.0, "a": 1.0})
    torch.testing.assert_close(net(inputs()), expected)
    for handle in handles:
        handle.merge_()
    torch.testing.assert_close(net(inputs()), expected)
    weight = mlp()[0].weight
    change = sum(adapted(mlp(), text, seed=seed).update_of("0").dense() for text, seed in ((first, 2), (second, 3)))
    torch.testing.assert_close(net[0].weight, weight + change)


def test_04_a_file_says_which_rotation_its_tensor_means(tmp_path: Path) -> None:
    """Trained with the series, read with the inverse, and the other way round: the rotation stays, to the series' error."""
    for trained, other in (("neumann", "exact"), ("exact", "neumann")):
        net, folder = mlp(), tmp_path / trained
        handle = rankwise.adapt_(net, rankwise.compose(f"oft(block=4, cayley='{trained}', terms=5)"))
        with torch.no_grad():
            for block in handle.blocks().values():
                block["skew"].copy_(torch.linspace(-0.1, 0.1, block["skew"].numel()).view_as(block["skew"]))
        expected, turned = net(inputs()), handle.update_of("0").dense()
        handle.save(folder)
        same = mlp()
        rankwise.load_(same, folder)
        assert torch.equal(same(inputs()), expected)
        description = (folder / "adapter.json").read_text()
        assert f'"{trained}"' in description
        (folder / "adapter.json").write_text(description.replace(f'"{trained}"', f'"{other}"'))
        fresh = mlp()
        changed = rankwise.load_(fresh, folder)
        assert (changed.update_of("0").dense() - turned).norm() < 1e-2 * turned.norm(), "not the inverse rotation"
        assert not torch.equal(fresh(inputs()), expected), "the mode is the one that was asked for"


def test_04_the_same_tensor_in_the_other_mode_is_the_transposed_rotation() -> None:
    """As in published files; reading such a file needs the mode it was trained in, which `sense` keeps."""
    rotations = []
    for text in ("oft(block=4)", "oft(block=4, cayley='neumann', terms=9)"):
        handle = rankwise.adapt_(mlp(layers=1), rankwise.compose(text))
        with torch.no_grad():
            handle.blocks()["0"]["skew"].copy_(torch.linspace(-0.1, 0.1, 12).view(2, 6))
        rotations.append(handle.parameterization("0").rotation().dense())
    torch.testing.assert_close(rotations[1], rotations[0].t(), rtol=1e-6, atol=1e-6)


DROPPING = [
    "oft(block=2, dropout={})",
    "oft(block=2, side='output', dropout={})",
    "oft(block=2, share_blocks=True, dropout={})",
]
DROPPING += ["boft(block=2, factors=2, dropout={})", "delora(rank=2, dropout={})", "capaboost(rank=2, dropout={})"]


@pytest.mark.parametrize("recipe", DROPPING)
@pytest.mark.parametrize("kind", [LAYERS[0], *CONVOLUTIONS[1:2]], ids=lambda kind: kind.name)
def test_05_dropout_drops_in_training_alone(kind: LayerKind, recipe: str) -> None:
    model, x = model_of(kind), inputs_of(kind)
    handle = rankwise.adapt_(model, rankwise.compose(recipe.format(0.5)), where=["layer"])
    with torch.no_grad():
        for tensor in handle.blocks()["layer"].values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.3)
    drawn = [model.train()(x) for _ in range(6)]
    assert any(not torch.equal(drawn[0], other) for other in drawn[1:]), "outputs vary in training"
    assert torch.equal(model.eval()(x), model(x))


def test_05_a_checkpointed_layer_drops_the_same_blocks_when_it_runs_again() -> None:
    from torch.utils.checkpoint import checkpoint

    found = []
    for runs in ("plain", "checkpointed", "without dropout"):
        net = mlp()
        handle = adapted(net, f"oft(block=2, dropout={0.0 if runs == 'without dropout' else 0.5})")
        net.train()
        y = checkpoint(net, inputs(), use_reentrant=False) if runs == "checkpointed" else net(inputs())
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        found.append(
            torch.cat([block["skew"].grad.flatten() for block in handle.blocks().values() if block["skew"].grad is not None])
        )
    plain, checkpointed, without = found
    torch.testing.assert_close(checkpointed, plain)
    assert not torch.allclose(without, plain), "some blocks were dropped"


def test_06_reflections_start_at_the_base_or_are_refused() -> None:
    net = mlp()
    rankwise.adapt_(net, rankwise.compose("hra(rank=4)"))
    torch.testing.assert_close(net(inputs()), mlp()(inputs()), rtol=1e-12, atol=1e-12)
    for text, why in (("hra(rank=3)", "rank is 3"), ("hra(rank=4, gram_schmidt=True)", "orthonormal")):
        with pytest.raises(ArgumentError, match=why):
            rankwise.adapt_(mlp(), rankwise.compose(text))
    for text in ("hra(rank=3, start='random')", "hra(rank=4, gram_schmidt=True, start='random')"):
        moved = mlp()
        rankwise.adapt_(moved, rankwise.compose(text))
        assert not torch.allclose(moved(inputs()), mlp()(inputs())), "it said so"


@pytest.mark.parametrize("recipe", ["ia3", "ia3(side='input')", "road(group=4)", "boft(block=4)"])
def test_26_a_gain_of_zero_is_merged_and_taken_out_again(recipe: str) -> None:
    net = mlp()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    handle = rankwise.adapt_(net, rankwise.compose(recipe))
    with torch.no_grad():
        for block in handle.blocks().values():
            block["gain"][0] = 0.0
    expected = net(inputs())
    handle.merge_()
    torch.testing.assert_close(net(inputs()), expected)
    handle.unmerge_()
    handle.detach_()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_28_norms_are_those_of_the_base_while_another_adapter_is_merged() -> None:
    net = mlp()
    expected = net[0].weight.norm(dim=0)
    first = adapted(net, "lora(rank=2)", name="first")
    first.merge_()
    assert not torch.allclose(net[0].weight.norm(dim=0), expected)
    second = rankwise.adapt_(net, rankwise.compose("delora(rank=2)"), name="second")
    torch.testing.assert_close(second.parameterization("0").column_norms, expected)
    assert first.merged, "what was merged stays merged"


def test_30_norms_of_another_base_do_not_travel(tmp_path: Path) -> None:
    handle = adapted(mlp(), "delora(rank=2)")
    handle.save(tmp_path)
    with pytest.raises(FingerprintError):
        rankwise.load_(mlp(seed=1), tmp_path)
    fresh = mlp()
    loaded = rankwise.load_(fresh, tmp_path)
    torch.testing.assert_close(loaded.parameterization("0").column_norms, fresh[0].weight.norm(dim=0))


@pytest.mark.parametrize("recipe", EVERY_ONE)
def test_37_a_weight_that_trains_too_gets_its_gradient(recipe: str) -> None:
    net = mlp(layers=1)
    adapted(net, recipe)
    net[0].weight.requires_grad_(True)
    net(inputs()).square().sum().backward()
    grad = net[0].weight.grad
    assert grad is not None and grad.norm() > 0
    again = mlp(layers=1)
    adapted(again, recipe, binding="weight")
    original = again[0].parametrizations.weight.original  # type: ignore[union-attr]
    original.requires_grad_(True)
    again(inputs()).square().sum().backward()
    torch.testing.assert_close(grad, original.grad)


@pytest.mark.parametrize("recipe", EVERY_ONE)
def test_40_hooks_of_the_layer_fire_and_a_layer_with_a_forward_of_its_own_keeps_it(recipe: str) -> None:
    class Counted(nn.Linear):
        """Stands for a quantized layer: no plain weight, and a forward that must not be gone around."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counted.calls += 1
            return super().forward(x)

    net = mlp(layers=1)
    counted = Counted(8, 8).double()
    counted.load_state_dict(net[0].state_dict())
    net[0] = counted
    seen: list[Tensor] = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    adapted(net, recipe)
    expected = net(inputs())
    assert len(seen) == 1 and torch.equal(seen[0], expected), "a hook sees the adapted output"
    counted.weight = nn.Parameter(_Opaque(counted.weight.detach()), requires_grad=False)
    Counted.calls = 0
    torch.testing.assert_close(net(inputs()), expected)
    assert Counted.calls == 1, "the layer's own forward ran, once"


class _Opaque(Tensor):
    """A weight that is no plain tensor, as quantized ones are."""


def test_41_levels_of_a_butterfly_are_what_was_asked_for(tmp_path: Path) -> None:
    net = mlp()
    handle = adapted(net, "boft(block=2, factors=3)")
    assert handle.blocks()["0"]["blocks"].shape == (3, 4, 2, 2)
    rotation = handle.parameterization("0").rotation().dense()
    assert (rotation.abs() > 1e-9).all(), "three levels of four blocks mix every coordinate with every other"
    (stored,) = [load_file(path) for path in handle.save(tmp_path).glob("*.safetensors")]
    assert stored["0.blocks"].shape == (3, 4, 2, 2)
    assert json.loads((tmp_path / "adapter.json").read_text())["recipe"]["parameterization"]["arguments"]["factors"] == 3
    with pytest.raises(RecipeError, match="multiple of block"):
        rankwise.adapt_(mlp(), rankwise.compose("boft(block=2, factors=4)"))


def test_51_the_first_gradient_is_of_the_size_of_loras() -> None:
    """With B = 0 and a clamp at 1e-4 it is some ten thousand times larger, and clipping by the global norm stops all else."""
    norms = {}
    for text in ("lora(rank=2, alpha=15, input_start='kaiming')", "delora(rank=2)", "delora(rank=2, start='zero')"):
        net = mlp()
        handle = rankwise.adapt_(net, rankwise.compose(text))
        net(inputs()).square().sum().backward()
        norms[text] = max(p.grad.norm().item() for p in handle.blocks()["0"].values() if p.grad is not None)
    lora, ours, clamped = norms.values()
    assert 0.01 < ours / lora < 100
    assert clamped > 1000 * ours, "the start that is not the default, and why"


def test_51_a_clipped_step_moves_the_other_layers_too() -> None:
    net = mlp()
    first = rankwise.adapt_(net, rankwise.compose("delora(rank=2)"), where=["0"], train_also=["1"])
    before = net[1].weight.detach().clone()
    net(inputs()).square().sum().backward()
    everything = [*first.blocks()["0"].values(), *net[1].parameters()]
    torch.nn.utils.clip_grad_norm_(everything, 1.0)
    optimizer = torch.optim.SGD(everything, lr=0.1)
    optimizer.step()
    assert (net[1].weight - before).norm() > 1e-3
