"""Part B of the list of silent errors: weights lost or corrupted. Tests are named by their number in the list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.core.errors import (
    ArgumentError,
    CheckpointError,
    FingerprintError,
    MergeError,
    TargetError,
    TrainingError,
)
from tests.never_silent.models import adapted, inputs, mlp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_23_merge_cycles_leave_the_base_to_the_bit(dtype: torch.dtype) -> None:
    net = mlp(dtype=dtype)
    before = net[0].weight.clone()
    handle = adapted(net)
    for _ in range(20):
        handle.merge_()
        assert not torch.equal(net[0].weight, before)
        handle.unmerge_()
    assert torch.equal(net[0].weight, before)


def test_24_nan_is_refused_before_the_weight_is_touched() -> None:
    net = mlp()
    handle = adapted(net)
    before = [layer.weight.clone() for layer in net]
    with torch.no_grad():
        handle.parameterization("1").roles()["B"][0, 0] = float("nan")
    with pytest.raises(MergeError, match=r"1\.B holds NaN"):
        handle.merge_()
    assert not handle.merged
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(net, before, strict=True))


def test_25_editing_while_merged_restores_the_original() -> None:
    net = mlp()
    before = net[0].weight.clone()
    handle = adapted(net)
    handle.merge_()
    with torch.no_grad():
        handle.parameterization("0").roles()["B"].mul_(100)
    handle.unmerge_()
    assert torch.equal(net[0].weight, before)


def test_27_switching_off_while_merged_keeps_the_merged_state() -> None:
    net = mlp()
    handle = adapted(net)
    handle.merge_()
    merged = net(inputs())
    with rankwise.switched_off(net):
        pass
    assert handle.merged
    assert torch.equal(net(inputs()), merged)


@pytest.mark.parametrize("recipe", ["dora(rank=2)", "lora_xs(rank=2)", "lora(rank=2) + pissa"])
def test_28_what_a_method_reads_off_the_base_is_the_true_base(recipe: str) -> None:
    """While one adapter is merged, a second one that reads W must not read the merged weight."""
    expected = adapted(mlp(), recipe)
    net = mlp()
    first = adapted(net, "lora(rank=2)", name="merged_one")
    first.merge_()
    second = adapted(net, recipe, name="second")
    for site in ("0", "1"):
        torch.testing.assert_close(second.update_of(site).dense(), expected.update_of(site).dense())
    first.unmerge_()
    assert torch.equal(net[0].weight, mlp()[0].weight)
    torch.testing.assert_close(net(inputs()), expected.model(inputs()))


@pytest.mark.parametrize("mode", ["absorb", "offset"])
def test_28_an_absorbed_start_is_no_part_of_another_adapter(mode: str) -> None:
    net = mlp()
    first = adapted(net, f"lora(rank=2) + pissa(mode='{mode}')", name="first")
    alone = net(inputs())
    second = adapted(net, "dora(rank=2)", name="second")
    torch.testing.assert_close(net(inputs()), adapted(mlp(), "dora(rank=2)").model(inputs()))
    rankwise.activate_(net, None)
    torch.testing.assert_close(net(inputs()), mlp()(inputs()))
    rankwise.activate_(net, {"first": 0.5, "second": 0.25})
    expected = mlp()[0].weight + 0.5 * first.update_of("0").dense() + 0.25 * second.update_of("0").dense()
    torch.testing.assert_close(rankwise.effective_weights(net)["0.weight"], expected)
    first.activate_()
    torch.testing.assert_close(net(inputs()), alone)
    first.detach_()
    second.activate_()
    torch.testing.assert_close(net(inputs()), adapted(mlp(), "dora(rank=2)").model(inputs()))
    second.detach_()
    assert torch.equal(net[0].weight, mlp()[0].weight)


def test_29_a_start_that_rewrote_the_base_finds_the_plain_base(tmp_path: Path) -> None:
    """An absorbed start is saved with what it took out of the weight, so it loads onto the untouched base."""
    for mode in ("absorb", "offset"):
        net = mlp()
        adapted(net, f"lora(rank=2) + pissa(mode='{mode}')").save(tmp_path / mode)
        fresh = mlp()
        handle = rankwise.load_(fresh, tmp_path / mode)
        torch.testing.assert_close(fresh(inputs()), net(inputs()), rtol=1e-12, atol=1e-12)
        handle.detach_()
        assert torch.equal(fresh[0].weight, mlp()[0].weight)


def test_30_a_different_base_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    adapted(mlp(seed=0)).save(tmp_path)
    other = mlp(seed=1)
    with pytest.raises(FingerprintError, match="2 of 2 weights differ"):
        rankwise.load_(other, tmp_path)
    assert list(other.state_dict()) == list(mlp().state_dict()), "a refused load leaves nothing behind"
    rankwise.load_(other, tmp_path, any_base=True)


def test_30_the_same_base_in_another_precision_is_accepted(tmp_path: Path) -> None:
    adapted(mlp(dtype=torch.float32)).save(tmp_path)
    rankwise.load_(mlp(dtype=torch.float32).to(torch.bfloat16), tmp_path)


def test_31_loading_into_a_taken_name_is_refused(tmp_path: Path) -> None:
    adapted(mlp(), "lora(rank=2, alpha=8)").save(tmp_path)
    net = mlp()
    adapted(net, "lora(rank=2, alpha=2)")
    with pytest.raises(ArgumentError, match="'default' is on this model already"):
        rankwise.load_(net, tmp_path)
    loaded = rankwise.load_(net, tmp_path, name="other")
    assert loaded.parameterization("0").scale == 4.0


def test_32_keys_without_a_place_and_places_without_a_key_are_errors(tmp_path: Path) -> None:
    handle = adapted(mlp())
    handle.save(tmp_path)
    description, tensors = rankwise.core.checkpoint.read(tmp_path)
    renamed = {key.replace("1.A", "1.Q"): value for key, value in tensors.items()}
    rankwise.core.checkpoint.write(tmp_path, description, renamed)
    with pytest.raises(CheckpointError, match=r"1 tensors of the file have no place here \(1\.Q\).*1\.A"):
        rankwise.load_(mlp(), tmp_path)


def test_32_an_adapter_of_eight_layers_on_a_base_of_four_is_refused(tmp_path: Path) -> None:
    adapted(mlp(layers=8)).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapts 8 layers, 4 of which are not in this model \(4, 5, 6 and 1 more\)"):
        rankwise.load_(mlp(layers=4), tmp_path)


def test_33_a_misspelled_target_beside_a_valid_one_is_an_error() -> None:
    net = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match=r"'valeu' matches nothing\. Did you mean 'value'.*nothing was changed"):
        rankwise.adapt_(net, rankwise.compose("lora(rank=2)"), where=["query", "valeu"])
    with pytest.raises(TargetError, match="'clasifier' is no module"):
        rankwise.adapt_(net, rankwise.compose("lora(rank=2)"), where=["query"], train_also=["clasifier"])


def test_34_a_loaded_adapter_goes_on_training(tmp_path: Path) -> None:
    net = mlp()
    handle = adapted(net)
    handle.save(tmp_path)
    fresh = mlp()
    loaded = rankwise.load_(fresh, tmp_path)
    assert loaded.trained_numbers == handle.trained_numbers > 0
    optimizer = loaded.optimizer(lr=1e-2)
    first = fresh(inputs()).square().sum()
    first.backward()
    loaded.after_backward()
    optimizer.step()
    assert fresh(inputs()).square().sum() < first


def test_35_choosing_an_adapter_does_not_make_it_train(tmp_path: Path) -> None:
    adapted(mlp()).save(tmp_path)
    net = mlp()
    loaded = rankwise.load_(net, tmp_path, trainable=False)
    loaded.activate_()
    rankwise.activate_(net, {"default": 0.5})
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_37_a_base_weight_trained_along_gets_its_gradient() -> None:
    net = mlp()
    adapted(net, "dora(rank=2)")
    net[0].weight.requires_grad_(True)
    net(inputs()).square().sum().backward()
    assert net[0].weight.grad is not None and torch.any(net[0].weight.grad != 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_38_the_adapter_of_the_forward_gets_the_gradient(reentrant: bool) -> None:
    """Gradient checkpointing runs the layer again in backward; switching adapters in between must not move the gradient."""
    net = mlp()
    first = adapted(net, name="first")
    second = adapted(net, name="second", seed=3)

    def gradient_of(checkpointed: bool, switch: bool) -> Tensor:
        first.activate_()
        net.zero_grad()
        x = inputs().requires_grad_(True)
        y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        if switch:
            second.activate_()
        y.square().sum().backward()
        return first.parameterization("0").roles()["B"].grad

    expected = gradient_of(checkpointed=False, switch=True).clone()
    torch.testing.assert_close(gradient_of(checkpointed=True, switch=False), expected)
    with pytest.raises(TrainingError, match="chosen between a checkpointed forward and its backward"):
        gradient_of(checkpointed=True, switch=True)


def test_40_hooks_on_an_adapted_layer_fire() -> None:
    net = mlp()
    adapted(net)
    calls: list[str] = []
    net[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    net[0].register_forward_hook(lambda *_: calls.append("after"))
    net(inputs())
    assert calls == ["before", "after"]


def test_files_that_are_damaged_say_so(tmp_path: Path) -> None:
    adapted(mlp()).save(tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    good, recipe = tensors.read_bytes(), json.loads((tmp_path / "adapter.json").read_text())

    def refused(content: bytes, message: str) -> None:
        tensors.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            rankwise.load_(mlp(), tmp_path)
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            if content[:8] != good[:8] or len(content) < len(good):
                rankwise.core.checkpoint.read_tensors(tensors)
            else:
                raise CheckpointError("cannot be read as safetensors")

    refused(good[:-9], "damaged: its content is not what adapter.json recorded")
    flipped = bytearray(good)
    flipped[-3] ^= 0x10
    refused(bytes(flipped), "damaged: its content is not what adapter.json recorded")
    refused((2**62).to_bytes(8, "little") + good[8:], "damaged")
    refused(b"PK\x03\x04 a zip archive", "damaged")
    tensors.write_bytes(good)
    for change, message in (
        ({"format": 99}, "format 99, this rankwise reads up to 1; upgrade"),
        ({"format": None}, "has no format number"),
        ({"tensors": "../evil.safetensors"}, "not a plain safetensors name"),
        ({"recipe": {**recipe["recipe"], "format": 7}}, "the recipe has format 7"),
        ({"recipe": {}}, "this is not a recipe"),
    ):
        (tmp_path / "adapter.json").write_text(json.dumps({**recipe, **change}))
        with pytest.raises(CheckpointError, match=message):
            rankwise.load_(mlp(), tmp_path)
    (tmp_path / "adapter.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="is damaged"):
        rankwise.load_(mlp(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no adapter\.json"):
        rankwise.load_(mlp(), tmp_path / "nowhere")


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    handle = adapted(net)
    handle.save(tmp_path)
    before = net(inputs())
    with torch.no_grad():
        handle.parameterization("0").roles()["B"].add_(1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*still whole"):
        handle.save(tmp_path)
    monkeypatch.undo()
    fresh = mlp()
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(inputs()), before)
    assert not list(tmp_path.glob(".writing*"))
