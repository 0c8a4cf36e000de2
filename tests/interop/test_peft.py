"""Adapters go to PEFT and come back; the real peft package is the judge."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.errors import CheckpointError, ExportError, FingerprintError
from tests.interop.models import conv_net, images, llama, stir, tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves

CONV = ["first", "second"]
Make = Callable[[], nn.Module]


def run(model: nn.Module) -> Tensor:
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    with torch.no_grad():
        return model.eval()(images()) if convolutional else model.eval()(input_ids=tokens()).logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def trained(make: Make, recipe: str, where: Any = "all-linear", **keywords: Any) -> rw.Handle:
    handle = rw.adapt_(make(), rw.compose(recipe), where, **keywords)
    stir(handle.model)
    return handle


EXPORTS: list[tuple[str, Make, Any]] = [
    ("lora(rank=3, alpha=7)", llama, "all-linear"),
    ("rslora(rank=3, alpha=5)", llama, "all-linear"),
    ("lora(rank=3)", llama, ["q_proj", "embed_tokens", "lm_head"]),
    ("pissa(rank=2)", llama, "all-linear"),
    ("vera(rank=5)", llama, "all-linear"),
    ("lora(rank=3, alpha=7)", conv_net, ["first", "second", "head"]),
    ("vera(rank=4)", conv_net, "all-layers"),
]


@pytest.mark.parametrize(("recipe", "make", "where"), EXPORTS)
def test_what_is_of_low_rank_goes_out_as_plain_lora_and_peft_gives_the_same(
    recipe: str, make: Make, where: Any, tmp_path: Path
) -> None:
    handle = trained(make, recipe, where)
    ours = run(handle.model)
    assert (ours - run(make())).abs().max() > 2e-3
    folder = rw.interop.to_peft(handle, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"]
    assert not {"use_rslora", "use_dora", "rank_pattern", "alpha_pattern"} & set(config)
    ranks = {tensor.shape[0] for key, tensor in load_file(folder / "adapter_model.safetensors").items() if "_A" in key}
    assert ranks == {config["r"]}
    close(run(peft.PeftModel.from_pretrained(make(), folder)), ours)
    again = make()
    rw.interop.from_peft(again, folder, any_base=False)
    close(run(again), ours)


NATIVE: list[tuple[str, Make, Any]] = [
    ("lora(rank=3, alpha=7)", llama, "all-linear"),
    ("rslora(rank=3, alpha=5)", llama, "all-linear"),
    ("dora(rank=3, alpha=7)", llama, "all-linear"),
    ("dora(rank=3, alpha=7)", llama, ["q_proj", "embed_tokens"]),
    ("dora + pissa(rank=2)", llama, "all-linear"),
    ("vera(rank=5)", llama, "all-linear"),
    ("dora(rank=3, alpha=7)", conv_net, ["first", "second", "head"]),
    ("rslora(rank=3, alpha=7)", conv_net, ["first", "second", "head"]),
]


@pytest.mark.parametrize(("recipe", "make", "where"), NATIVE)
def test_the_methods_own_form_means_the_same_in_peft(recipe: str, make: Make, where: Any, tmp_path: Path) -> None:
    handle = trained(make, recipe, where)
    ours = run(handle.model)
    folder = rw.interop.to_peft(handle, tmp_path / "a", native=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == ("VERA" if "vera" in recipe else "LORA")
    assert config.get("use_dora", False) == ("dora" in recipe) and config.get("use_rslora", False) == ("rslora" in recipe)
    close(run(peft.PeftModel.from_pretrained(make(), folder)), ours)
    again = make()
    rw.interop.from_peft(again, folder, any_base=False)
    close(run(again), ours)


LINEAR = ["q_proj", "v_proj", "down_proj"]
IMPORTS: dict[str, tuple[Make, Callable[[], Any]]] = {
    "lora": (llama, lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=LINEAR)),
    "rslora": (llama, lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=LINEAR)),
    "all-linear": (llama, lambda: peft.LoraConfig(r=3, target_modules="all-linear")),
    "expression": (llama, lambda: peft.LoraConfig(r=3, target_modules=r".*layers\.1\..*(q|k)_proj")),
    "layers": (llama, lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1])),
    "patterns": (
        llama,
        lambda: peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=LINEAR,
            rank_pattern={"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 5},
            alpha_pattern={"q_proj": 9, "layers.0.mlp.down_proj": 1},
        ),
    ),
    "embedding": (llama, lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "embed_tokens"])),
    "dora": (llama, lambda: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=LINEAR)),
    "dora of an embedding": (llama, lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=["embed_tokens"])),
    "rank above the layer": (llama, lambda: peft.LoraConfig(r=20, lora_alpha=7, target_modules=["k_proj"])),
    "vera": (llama, lambda: peft.VeraConfig(r=5, target_modules=LINEAR)),
    "vera without its factors": (llama, lambda: peft.VeraConfig(r=5, target_modules=LINEAR, save_projection=False)),
    "lora conv": (conv_net, lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=[*CONV, "head"])),
    "rslora conv": (conv_net, lambda: peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=CONV)),
    "dora conv": (conv_net, lambda: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=CONV)),
    "whole head": (conv_net, lambda: peft.LoraConfig(r=3, target_modules=CONV, modules_to_save=["head"])),
}


def saved_by_peft(make: Make, config: Any, folder: Path) -> tuple[Path, Tensor]:
    model = peft.get_peft_model(make(), config)
    stir(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder, run(model)


@pytest.mark.parametrize("case", IMPORTS)
def test_what_peft_saved_means_the_same_here(case: str, tmp_path: Path) -> None:
    make, config = IMPORTS[case]
    folder, theirs = saved_by_peft(make, config(), tmp_path / "theirs")
    assert (theirs - run(make())).abs().max() > 1e-3
    model = make()
    handle = rw.interop.from_peft(model, folder)
    close(run(model), theirs)
    assert handle.trained_numbers > 0 and all(p.requires_grad for block in handle.blocks().values() for p in block.values())
    handle.save(tmp_path / "ours")
    again = make()
    rw.load_(again, tmp_path / "ours")
    close(run(again), theirs)
    if "dora" not in case:
        back = rw.interop.to_peft(handle, tmp_path / "back")
        close(run(peft.PeftModel.from_pretrained(make(), back)), theirs)


def test_importing_conv1d_of_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=1, n_head=2))

    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"], fan_in_fan_out=True)
    folder, theirs = saved_by_peft(make, config, tmp_path / "theirs")
    model = make()
    handle = rw.interop.from_peft(model, folder)
    close(run(model), theirs)
    back = rw.interop.to_peft(handle, tmp_path / "back")
    close(run(peft.PeftModel.from_pretrained(make(), back)), theirs)


def test_trained_heads_go_as_modules_to_save_and_come_back(tmp_path: Path) -> None:
    handle = trained(conv_net, "lora(rank=2)", CONV, train_also=["head"])
    ours = run(handle.model)
    folder = rw.interop.to_peft(handle, tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    close(run(peft.PeftModel.from_pretrained(conv_net(), folder)), ours)
    model = conv_net()
    again = rw.interop.from_peft(model, folder)
    close(run(model), ours)
    assert set(again.auxiliary) == {"head.weight", "head.bias"}
    assert rw.interop.from_peft(conv_net(), folder, trainable=False).blocks() == {}


def test_read_peft_gives_the_updates_without_a_model(tmp_path: Path) -> None:
    handle = trained(llama, "rslora(rank=3, alpha=5)")
    for native in (False, True):
        updates = rw.interop.read_peft(rw.interop.to_peft(handle, tmp_path / f"{native}", native=native))
        assert set(updates) == set(handle.targets)
        for site, pair in updates.items():
            torch.testing.assert_close(pair.dense(), handle.update_of(site).dense().detach())


def test_one_common_rank_by_zero_padding(tmp_path: Path) -> None:
    recipe = rw.catalog.lora(rank=3)
    recipe = rw.Recipe(**{**recipe.__dict__, "ranks": {"model.layers.0.self_attn.q_proj": 5}})
    handle = rw.adapt_(llama(), recipe, ["q_proj"])
    stir(handle.model)
    ours = run(handle.model)
    folder = rw.interop.to_peft(handle, tmp_path / "a")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 5
    close(run(peft.PeftModel.from_pretrained(llama(), folder)), ours)
    folder = rw.interop.to_peft(handle, tmp_path / "b", rank=8)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    close(run(peft.PeftModel.from_pretrained(llama(), folder)), ours)
    folder = rw.interop.to_peft(handle, tmp_path / "c", native=True)
    assert json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    close(run(peft.PeftModel.from_pretrained(llama(), folder)), ours)


# -- refusals --------------------------------------------------------------------------------------------------------------


def test_full_rank_is_refused_with_rank_and_error_unless_a_tolerance_is_passed(tmp_path: Path) -> None:
    handle = trained(conv_net, "full", ["head"])
    S = torch.linalg.svdvals(handle.update_of("head").dense().detach())  # (5,)
    error = float(S[3:].norm() / S.norm())
    with pytest.raises(ExportError, match=rf"numerical rank 5; the best rank-3 substitute has relative error {error:.3g}"):
        rw.interop.to_peft(handle, tmp_path / "a", rank=3)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ExportError, match=r"above the tolerance"):
        rw.interop.to_peft(handle, tmp_path / "a", rank=3, tolerance=error * 0.9)
    rw.interop.to_peft(handle, tmp_path / "a", rank=3, tolerance=error * 1.01)
    lost = rw.interop.read_peft(tmp_path / "a")["head"].dense() - handle.update_of("head").dense()
    assert float(lost.norm() / S.norm()) == pytest.approx(error, rel=1e-3)
    rw.interop.to_peft(handle, tmp_path / "b", tolerance=error * 1.01)
    assert rw.interop.read_peft(tmp_path / "b")["head"].rank == 3


def test_a_smaller_rank_than_the_adapters_needs_a_tolerance(tmp_path: Path) -> None:
    handle = trained(llama, "lora(rank=4)", ["q_proj"])
    with pytest.raises(ExportError, match=r"numerical rank 4; the best rank-2 substitute"):
        rw.interop.to_peft(handle, tmp_path / "a", rank=2)


def test_an_update_with_nan_is_not_written(tmp_path: Path) -> None:
    handle = trained(llama, "lora(rank=2)", ["q_proj"])
    rw.interop.to_peft(handle, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(handle.blocks().values()))["B"][0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"NaN or infinity; nothing was written"):
        rw.interop.to_peft(handle, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_check_before_writing_bites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.interop import peft_export

    honest = peft_export.put_factors
    handle = trained(llama, "lora(rank=2)", ["q_proj"])
    monkeypatch.setattr(
        peft_export, "put_factors", lambda tensors, target, pair: honest(tensors, target, rw.LowRank(pair.B * 1.01, pair.A))
    )
    with pytest.raises(ExportError, match=r"off by 0\.01 of its norm"):
        rw.interop.to_peft(handle, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("layer", "trouble"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding mode"),
    ],
)
def test_convolutions_that_peft_would_run_differently_are_refused(layer: nn.Module, trouble: str, tmp_path: Path) -> None:
    handle = rw.adapt_(nn.Sequential(layer), rw.catalog.lora(rank=2), "all-conv")
    with pytest.raises(ExportError, match=trouble):
        rw.interop.to_peft(handle, tmp_path / "a")


def lora_folder(folder: Path, layers: int = 2, **changes: Any) -> Path:
    """A valid adapter, then changed fields of its config."""
    rw.interop.to_peft(trained(lambda: llama(layers), "lora(rank=2)", ["q_proj"]), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "BONE"}, "peft_type 'BONE'; rankwise reads LORA, .*rename the keys bone_block"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"kasa_config": {"a": 1}}, "kasa_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"new_trick": 3}, "new_trick=3 .a field that this rankwise does not know"),
        ({"r": 4}, "rank 2 in adapter_model.safetensors and rank 4 in adapter_config.json"),
        ({"rank_pattern": {"q_proj": 3}}, "rank 2 .* and rank 3"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"lora_alpha": "two"}, "lora_alpha is 'two', and takes numbers"),
        ({"target_modules": ["q_proj", "k_proj"]}, "names 4 layers .* tensors for 2"),
    ],
)
def test_a_config_that_cannot_be_reproduced_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = llama()
    before = set(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        rw.interop.from_peft(model, lora_folder(tmp_path / "a", **changes))
    assert set(model.state_dict()) == before


def test_a_field_the_user_vouches_for_is_ignored(tmp_path: Path) -> None:
    rw.interop.from_peft(llama(), lora_folder(tmp_path / "a", new_trick=3), ignore=["new_trick"])


def test_an_adapter_of_eight_layers_on_four_and_the_reverse(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapts 8 layers, 4 of which are not in this model"):
        rw.interop.from_peft(llama(4), lora_folder(tmp_path / "eight", 8))
    folder = lora_folder(tmp_path / "four", 4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"names 8 layers of this model, the file has tensors for 4"):
        rw.interop.from_peft(llama(8), folder)


def test_unknown_missing_and_pickled_tensors_are_refused(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.norm.weight": torch.ones(16)}, file)
    with pytest.raises(CheckpointError, match=r"1 of 5 tensors belong to nothing .*norm"):
        rw.interop.from_peft(llama(), folder)
    key = next(key for key in tensors if "lora_B" in key)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=r"has A and needs A, B"):
        rw.interop.from_peft(llama(), folder)
    save_file({**tensors, key: torch.zeros(9, 2)}, file)
    with pytest.raises(CheckpointError, match=r"is 16×16 here and 9×16 in the file"):
        rw.interop.from_peft(llama(), folder)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors"):
        rw.interop.from_peft(llama(), folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled and is never opened"):
        rw.interop.from_peft(llama(), folder)


def test_another_base_is_refused_on_request(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "a")
    with pytest.raises(FingerprintError, match="2 of 2 weights differ"):
        rw.interop.from_peft(llama(seed=9), folder, any_base=False)
    rw.interop.from_peft(llama(seed=9), folder)


def test_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    rw.interop.from_peft(llama(), tmp_path)
    with pytest.raises(CheckpointError, match="brings its own weight for model"):
        rw.interop.from_peft(llama(seed=9), tmp_path)


def test_names_that_end_others_go_as_an_expression(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))

    handle = rw.adapt_(make(), rw.catalog.lora(rank=2), lambda name, _: name == "0")
    stir(handle.model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    folder = rw.interop.to_peft(handle, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(make(), folder)
    close(theirs(x), handle.model(x))
    rw.interop.from_peft(make(), folder)


def test_a_merged_adapter_exports_the_same(tmp_path: Path) -> None:
    handle = trained(llama, "lora(rank=2)", ["q_proj"])
    ours = run(handle.model)
    handle.merge_()
    close(run(peft.PeftModel.from_pretrained(llama(), rw.interop.to_peft(handle, tmp_path / "a"))), ours)
