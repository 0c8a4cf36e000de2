"""Every adapter type of PEFT: saved by the real package, read here, the same outputs, trained on."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.errors import ArgumentError, CheckpointError, FingerprintError, TrainingError
from tests.interop.models import conv_net, llama, stir
from tests.interop.peft_cases import (
    CASES,
    CONV,
    LINEAR,
    changed,
    close,
    forward,
    refused,
    run,
    saved,
    squares,
    stored,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_means_the_same_here_and_trains_on(case: str, tmp_path: Path) -> None:
    make, config, method = CASES[case]
    theirs = saved(make, config(), tmp_path / "theirs")
    assert (theirs - run(make())).abs().max() > 1e-3
    model = make()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    handle = rw.interop.from_peft(model, tmp_path / "theirs")
    assert handle.recipe.parameterization.name == method
    close(run(model), theirs)
    handle.save(tmp_path / "ours")
    again = make()
    rw.load_(again, tmp_path / "ours")
    close(run(again), theirs)
    trained_on(handle, frozen)


def trained_on(handle: rw.Handle, frozen: dict[str, Tensor]) -> None:
    """One step moves every tensor of the adapter, and none of the base."""
    before = {site: {role: tensor.detach().clone() for role, tensor in b.items()} for site, b in handle.blocks().items()}
    buffers = [buffer.clone() for site in handle.targets for buffer in handle.parameterization(site).buffers()]
    optimizer = handle.optimizer(lr=1e-2)
    out = forward(handle.model.train())
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    optimizer.step()
    for site, block in handle.blocks().items():
        for role, tensor in block.items():
            assert not torch.equal(tensor, before[site][role]), (site, role)
    for name, parameter in handle.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    after = [buffer for site in handle.targets for buffer in handle.parameterization(site).buffers()]
    assert all(torch.equal(old, new) for old, new in zip(buffers, after, strict=True))


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=1, n_head=2))

    layers = {"target_modules": ["c_attn"], "fan_in_fan_out": True}  # 16 → 48
    for name, config in {
        "fourierft": peft.FourierFTConfig(n_frequency=20, scaling=30.0, **layers),
        "randlora": peft.RandLoraConfig(r=3, randlora_alpha=4, **layers),
        "vblora": peft.VBLoRAConfig(r=3, num_vectors=12, vector_length=4, **layers),
        "gralora": peft.GraloraConfig(r=4, gralora_k=2, **layers),
        "ia3": peft.IA3Config(feedforward_modules=["c_attn"], **layers),
        "hira": peft.HiraConfig(r=3, **layers),
        "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **layers),
    }.items():
        theirs = saved(make, config, tmp_path / name)
        assert (theirs - run(make())).abs().max() > 1e-3
        model = make()
        rw.interop.from_peft(model, tmp_path / name)
        close(run(model), theirs)


def test_dropouts_of_another_kind_matter_in_training_alone(tmp_path: Path) -> None:
    config = peft.LoKrConfig(r=1, module_dropout=0.5, rank_dropout=0.1, target_modules=LINEAR)
    theirs = saved(llama, config, tmp_path)
    refused(tmp_path, r"module_dropout=0\.5 .the whole update is dropped; in training alone.*rank_dropout=0\.1")
    model = llama()
    assert not rw.interop.from_peft(model, tmp_path, trainable=False).blocks()
    close(run(model), theirs)
    rw.interop.from_peft(llama(), tmp_path, ignore=["rank_dropout", "module_dropout"])


def test_a_dropout_that_both_have_is_kept(tmp_path: Path) -> None:
    saved(llama, peft.GraloraConfig(r=4, gralora_dropout=0.3, target_modules=LINEAR), tmp_path)
    assert rw.interop.from_peft(llama(), tmp_path).recipe.parameterization.arguments["dropout"] == 0.3


def test_oft_of_an_old_peft_is_read_with_a_warning(tmp_path: Path) -> None:
    saved(llama, CASES["oft neumann"][1](), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.interop.from_peft(llama(), tmp_path)
    for version, said in ((..., "did not note its version"), ("0.17.1", "peft 0.17"), ("0.18.0.dev0@abc", None)):
        changed(tmp_path, peft_version=version)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            rw.interop.from_peft(llama(), tmp_path)
        texts = [str(warning.message) for warning in heard if "truncated series" in str(warning.message)]
        assert len(texts) == (said is not None) and all(said in text for text in texts if said)
    saved(llama, CASES["oft exact"][1](), tmp_path / "exact")
    changed(tmp_path / "exact", peft_version="0.15.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.interop.from_peft(llama(), tmp_path / "exact")


def test_blocks_that_peft_adjusted_and_ranks_become_those_of_the_layers(tmp_path: Path) -> None:
    saved(llama, peft.OFTConfig(r=4, oft_block_size=0, target_modules=LINEAR), tmp_path)  # blocks of 4, and of 6 for n = 24
    handle = rw.interop.from_peft(llama(), tmp_path)
    assert handle.recipe.arguments_at("model.layers.0.mlp.down_proj")["block"] == 6
    assert handle.recipe.arguments_at("model.layers.0.self_attn.q_proj")["block"] == 4
    assert rw.Recipe.from_json(handle.recipe.to_json()) == handle.recipe
    saved(llama, CASES["loha with patterns"][1](), tmp_path / "loha")
    handle = rw.interop.from_peft(llama(), tmp_path / "loha")
    entry = handle.parameterization("model.layers.0.self_attn.q_proj")
    assert (entry.rank, entry.scale) == (3, pytest.approx(5 / 3))
    assert handle.parameterization("model.layers.0.self_attn.v_proj").scale == 3.5


def test_ia3_without_its_list_goes_by_the_shape_where_that_tells(tmp_path: Path) -> None:
    theirs = saved(llama, CASES["ia3"][1](), tmp_path)
    changed(tmp_path, feedforward_modules=None)
    model = llama()
    handle = rw.interop.from_peft(model, tmp_path)
    close(run(model), theirs)
    sides = {site: handle.recipe.arguments_at(site)["side"] for site in handle.targets}
    assert {side for site, side in sides.items() if "down_proj" in site} == {"input"} and set(sides.values()) == {
        "input",
        "output",
    }

    def square() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 3, 2))

    saved(square, peft.IA3Config(target_modules=["0"], feedforward_modules=["0"]), tmp_path / "conv")
    changed(tmp_path / "conv", feedforward_modules=None)
    refused(tmp_path / "conv", "may scale its inputs or its outputs, and the config has no feedforward_modules", square)


def test_bases_of_randlora_that_disagree_are_refused(tmp_path: Path) -> None:
    saved(llama, CASES["randlora"][1](), tmp_path)
    key, bases = stored(tmp_path, "q_proj.randlora_A")
    other = bases.clone()
    other[0, 0, 0] += 1
    changed(tmp_path, {key: other})
    refused(tmp_path, "is not the randlora_A of the other layers")
    changed(tmp_path, {key: None})
    rw.interop.from_peft(llama(), tmp_path)  # one copy is enough


def test_bases_of_randlora_are_stored_once_with_the_adapter(tmp_path: Path) -> None:
    saved(llama, CASES["randlora"][1](), tmp_path / "theirs")
    handle = rw.interop.from_peft(llama(), tmp_path / "theirs", seed=5)
    handle.save(tmp_path / "ours")
    tensors = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    shared = [key for key in tensors if key.startswith("rankwise_banks.")]
    assert len(shared) == 2 and len(tensors) == 2 + 2 * len(handle.targets)
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert trained == handle.trained_numbers + sum(tensors[key].numel() for key in shared)


def test_bases_of_randlora_that_are_missing_are_refused(tmp_path: Path) -> None:
    saved(llama, CASES["randlora without its bases"][1](), tmp_path)
    changed(tmp_path, save_projection=True)
    refused(tmp_path, "randlora_A is missing in the file")


def test_a_compact_vblora_is_for_inference(tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(r=3, num_vectors=12, vector_length=4, topk=3, save_only_topk_weights=True, target_modules=LINEAR)
    theirs = saved(llama, config, tmp_path)
    assert stored(tmp_path, "topk_indices")[1].dtype is torch.uint8
    refused(tmp_path, "the logits that lost are not in the file; in training alone, so pass trainable=False")
    model = llama()
    handle = rw.interop.from_peft(model, tmp_path, trainable=False)
    close(run(model), theirs)
    with pytest.raises(TrainingError, match="trainable=False"):
        handle.optimizer(lr=1e-3)
    key, ids = stored(tmp_path, "topk_indices")
    changed(tmp_path, {key: ids + 12})
    refused(tmp_path, r"chooses vectors 1\d to \d\d with 2 stored weights each; the config has 12 vectors", trainable=False)


def test_delora_notices_another_base_by_its_norms(tmp_path: Path) -> None:
    theirs = saved(llama, CASES["delora"][1](), tmp_path)

    def other() -> nn.Module:
        return llama(seed=9)

    refused(tmp_path, "columns of other norms than this model's .they differ by", other, FingerprintError)
    model = llama(seed=9)
    handle = rw.interop.from_peft(model, tmp_path, ignore=["delora_w_norm"])
    _, norms = stored(tmp_path, "0.self_attn.q_proj.delora_w_norm")
    torch.testing.assert_close(handle.parameterization("model.layers.0.self_attn.q_proj").column_norms, norms)
    half = llama().to(torch.bfloat16)  # rounding the base is no other base
    rw.interop.from_peft(half, tmp_path)
    assert (run(half).float() - theirs).abs().max() < 0.2


def test_adalora_keeps_its_pruned_ranks_and_their_scale(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), config)
    stir(model)
    keep = {0: [True, False, True, False], 1: [False] * 4}
    with torch.no_grad():
        for layer, kept in keep.items():
            model.base_model.model.model.layers[layer].self_attn.q_proj.lora_E["default"].mul_(torch.tensor(kept)[:, None])
    theirs = run(model)
    model.peft_config["default"].rank_pattern = {
        f"model.layers.{layer}.self_attn.q_proj.lora_E.default": kept for layer, kept in keep.items()
    }
    model.save_pretrained(tmp_path / "theirs")
    ours = llama()
    handle = rw.interop.from_peft(ours, tmp_path / "theirs")
    close(run(ours), theirs)
    assert [handle.parameterization(site).rank for site in handle.targets] == [2, 0]
    handle.save(tmp_path / "ours")
    again = llama()
    rw.load_(again, tmp_path / "ours")
    close(run(again), theirs)


def test_shira_entries_in_any_order_and_none_twice(tmp_path: Path) -> None:
    theirs = saved(llama, CASES["shira"][1](), tmp_path)
    key, indices = stored(tmp_path, "shira_indices")
    weight = key.replace("indices", "weight")
    values = load_file(tmp_path / "adapter_model.safetensors")[weight]
    changed(tmp_path, {key: indices.flip(1), weight: values.flip(0)})
    model = llama()
    rw.interop.from_peft(model, tmp_path)
    close(run(model), theirs)
    twice = indices.clone()
    twice[:, 0] = twice[:, 1]
    changed(tmp_path, {key: twice})
    refused(tmp_path, "names the same entry twice")
    outside = indices.clone()
    outside[0, 0] = 99
    changed(tmp_path, {key: outside})
    refused(tmp_path, "names entries outside of 16×24")


def test_convolutions_that_peft_runs_differently_are_refused(tmp_path: Path) -> None:
    saved(squares, peft.OFTConfig(oft_block_size=3, target_modules=["first"]), tmp_path / "oft")
    refused(tmp_path / "oft", r"a kernel \(3, 3\), whose overlapping patches PEFT rotates", squares)

    def uneven() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=(2, 1)))

    saved(uneven, peft.HRAConfig(r=4, target_modules=["0"]), tmp_path / "hra")
    refused(tmp_path / "hra", r"stride \(2, 1\), padding \(0, 0\), of which PEFT reads the first number", uneven)

    def circular() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))

    saved(circular, peft.LoHaConfig(r=2, target_modules=["0"]), tmp_path / "loha")
    refused(tmp_path / "loha", "padding mode 'circular'", circular)


def test_a_layer_of_a_kind_that_peft_does_not_adapt_this_way_is_refused(tmp_path: Path) -> None:
    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4))

    model = peft.get_peft_model(linear(), peft.RoadConfig(group_size=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    refused(tmp_path, "0 is of kind conv; PEFT's ROAD knows layers of kind linear", lambda: nn.Sequential(nn.Conv2d(4, 4, 1)))


def test_half_precision_whole_heads_and_merging(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=3, target_modules=CONV, modules_to_save=["head"])
    theirs = saved(conv_net, config, tmp_path)
    model = conv_net()
    handle = rw.interop.from_peft(model, tmp_path)
    close(run(model), theirs)
    assert set(handle.auxiliary) == {"head.weight", "head.bias"}
    handle.merge_()
    close(run(model), theirs)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    changed(tmp_path, {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()})
    model = conv_net()
    rw.interop.from_peft(model, tmp_path)
    torch.testing.assert_close(run(model), theirs, atol=0.05, rtol=0.05)


def test_updates_of_these_types_need_the_model(tmp_path: Path) -> None:
    saved(llama, CASES["loha"][1](), tmp_path)
    with pytest.raises(
        CheckpointError, match="it is of peft_type LOHA, not LORA, so its update cannot be read without the model"
    ):
        rw.interop.read_peft(tmp_path)


def test_overrides_of_a_recipe_are_checked_and_composed() -> None:
    recipe = dataclasses.replace(rw.catalog.c3a(block=4), overrides={"a": {"block": 2}})
    assert recipe.arguments_at("a") == {"block": 2} and recipe.arguments_at("b") == {"block": 4}
    assert rw.compose(recipe, "sam").overrides == {"a": {"block": 2}}
    assert "overrides" not in rw.catalog.c3a(block=4).to_json()
    with pytest.raises(ArgumentError, match="C3A has no argument 'blocks'"):
        dataclasses.replace(recipe, overrides={"a": {"blocks": 2}})
