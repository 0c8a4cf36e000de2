"""Every adapter type of PEFT: saved by the real package, read here, the same outputs, and what must be refused."""

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
from rankwise.core.errors import CheckpointError, FingerprintError, RankwiseError, TrainingError
from tests.interop.models import conv_net, images, llama, stir, tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves

LINEAR = ["q_proj", "v_proj", "down_proj"]  # 16 → 16, 16 → 8, 24 → 16
CONV = ["first", "second"]  # 3 → 8 (3 × 3), 8 → 6 (3 × 2, stride 2)
Make = Callable[[], nn.Module]


class SquareConvs(nn.Module):
    """Convolutions that PEFT's code for square kernels can hold, with padding and stride, and one of kernel 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.second = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


class Sounds(nn.Module):
    """A Conv1d in groups, dilated, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, groups=2, dilation=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu().mean(2))


def seeded(build: Make) -> Make:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    return make


squares, sounds = seeded(SquareConvs), seeded(Sounds)


def forward(model: nn.Module) -> Tensor:
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model(images())
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return model(torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1)))
    return model(input_ids=tokens()).logits


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return forward(model.eval())


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def saved(make: Make, config: Any, folder: Path, size: float = 0.2) -> Tensor:
    """Writes a stirred adapter of the real package; its outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(make(), config)
    stir(model, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return run(model)


CASES: dict[str, tuple[Make, Callable[[], Any], str]] = {
    "loha": (llama, lambda: peft.LoHaConfig(r=3, alpha=7, target_modules=LINEAR), "LoHa"),
    "loha with patterns": (
        llama,
        lambda: peft.LoHaConfig(
            r=3, alpha=7, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 5}, target_modules=LINEAR, init_weights=False
        ),
        "LoHa",
    ),
    "loha conv flat": (conv_net, lambda: peft.LoHaConfig(r=3, alpha=7, target_modules=[*CONV, "head"]), "LoHa"),
    "loha conv tucker": (
        conv_net,
        lambda: peft.LoHaConfig(r=3, alpha=7, use_effective_conv2d=True, target_modules=[*CONV, "head"]),
        "LoHa",
    ),
    "loha conv1d tucker": (
        sounds,
        lambda: peft.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["first", "head"]),
        "LoHa",
    ),
    "loha conv1d flat": (sounds, lambda: peft.LoHaConfig(r=2, target_modules=["first"]), "LoHa"),
    "lokr": (llama, lambda: peft.LoKrConfig(r=1, alpha=7, target_modules=LINEAR), "LoKr"),
    "lokr whole": (llama, lambda: peft.LoKrConfig(r=8, alpha=7, target_modules=LINEAR), "LoKr"),
    "lokr both": (
        llama,
        lambda: peft.LoKrConfig(r=1, alpha=7, decompose_both=True, decompose_factor=3, target_modules=LINEAR),
        "LoKr",
    ),
    "lokr by a factor, as lycoris": (
        llama,
        lambda: peft.LoKrConfig(
            r=2, alpha=7, decompose_factor=2, alpha_pattern={"q_proj": 3}, init_weights="lycoris", target_modules=LINEAR
        ),
        "LoKr",
    ),
    "lokr conv": (conv_net, lambda: peft.LoKrConfig(r=1, alpha=7, target_modules=[*CONV, "head"]), "LoKr"),
    "lokr conv tucker": (
        conv_net,
        lambda: peft.LoKrConfig(r=1, alpha=7, use_effective_conv2d=True, target_modules=[*CONV, "head"]),
        "LoKr",
    ),
    "lokr conv whole": (conv_net, lambda: peft.LoKrConfig(r=8, alpha=7, target_modules=CONV), "LoKr"),
    "lokr conv1d tucker": (
        sounds,
        lambda: peft.LoKrConfig(r=1, alpha=7, use_effective_conv2d=True, target_modules=["first", "head"]),
        "LoKr",
    ),
    "oft exact": (llama, lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=LINEAR), "OFT"),
    "oft neumann": (llama, lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEAR), "OFT"),
    "oft of more terms": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=8, target_modules=LINEAR),
        "OFT",
    ),
    "oft by the number of blocks": (llama, lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=LINEAR), "OFT"),
    "oft with an adjusted block": (llama, lambda: peft.OFTConfig(oft_block_size=5, target_modules=LINEAR), "OFT"),
    "oft shared": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, block_share=True, use_cayley_neumann=False, target_modules=LINEAR),
        "OFT",
    ),
    "coft": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3, use_cayley_neumann=False, target_modules=LINEAR),
        "OFT",
    ),
    "oft of an embedding": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["embed_tokens", "q_proj"]),
        "OFT",
    ),
    "oft conv": (squares, lambda: peft.OFTConfig(oft_block_size=2, target_modules=["second", "head"]), "OFT"),
    "boft": (llama, lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR), "BOFT"),
    "boft by the number of blocks": (
        llama,
        lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=LINEAR),
        "BOFT",
    ),
    "boft conv": (squares, lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=1, target_modules=CONV), "BOFT"),
    "hra": (llama, lambda: peft.HRAConfig(r=4, target_modules=LINEAR), "Householder"),
    "hra odd": (llama, lambda: peft.HRAConfig(r=3, target_modules=LINEAR), "Householder"),
    "hra gram-schmidt": (llama, lambda: peft.HRAConfig(r=4, apply_GS=True, target_modules=LINEAR), "Householder"),
    "hra conv": (squares, lambda: peft.HRAConfig(r=4, target_modules=CONV), "Householder"),
    "ia3": (
        llama,
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "IA3",
    ),
    "ia3 of inputs alone": (
        llama,
        lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=".*q_proj"),
        "IA3",
    ),
    "ia3 conv": (conv_net, lambda: peft.IA3Config(target_modules=[*CONV, "head"], feedforward_modules=["second"]), "IA3"),
    "randlora": (llama, lambda: peft.RandLoraConfig(r=3, randlora_alpha=4, target_modules=LINEAR), "RandomBases"),
    "randlora without its bases": (
        llama,
        lambda: peft.RandLoraConfig(r=3, randlora_alpha=4, save_projection=False, target_modules=LINEAR),
        "RandomBases",
    ),
    "randlora sparse without its bases": (
        llama,
        lambda: peft.RandLoraConfig(
            r=3, randlora_alpha=4, sparse=True, save_projection=False, projection_prng_key=5, target_modules=LINEAR
        ),
        "RandomBases",
    ),
    "randlora very sparse without its bases": (
        llama,
        lambda: peft.RandLoraConfig(r=3, randlora_alpha=4, very_sparse=True, save_projection=False, target_modules=LINEAR),
        "RandomBases",
    ),
    "fourierft": (llama, lambda: peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=LINEAR), "FourierFT"),
    "fourierft with a pattern": (
        llama,
        lambda: peft.FourierFTConfig(
            n_frequency=20, n_frequency_pattern={"v_proj": 9}, random_loc_seed=3, target_modules=LINEAR
        ),
        "FourierFT",
    ),
    "c3a": (llama, lambda: peft.C3AConfig(block_size=8, target_modules=LINEAR), "C3A"),
    "c3a with a pattern": (
        llama,
        lambda: peft.C3AConfig(block_size=8, block_size_pattern={"q_proj": 16}, target_modules=LINEAR),
        "C3A",
    ),
    "shira": (llama, lambda: peft.ShiraConfig(r=2, target_modules=LINEAR), "SHiRA"),
    "vblora": (llama, lambda: peft.VBLoRAConfig(r=3, num_vectors=12, vector_length=4, target_modules=LINEAR), "VectorBank"),
    "gralora": (llama, lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=LINEAR), "GraLoRA"),
    "gralora hybrid": (
        llama,
        lambda: peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=3, target_modules=LINEAR),
        "GraLoRA",
    ),
    "delora": (
        llama,
        lambda: peft.DeloraConfig(
            r=3, delora_lambda=4, rank_pattern={"v_proj": 2}, lambda_pattern={"q_proj": 2}, target_modules=LINEAR
        ),
        "DeLoRA",
    ),
    "road 1": (llama, lambda: peft.RoadConfig(variant="road_1", group_size=8, target_modules=LINEAR), "RoAd"),
    "road 2": (llama, lambda: peft.RoadConfig(variant="road_2", group_size=4, target_modules=LINEAR), "RoAd"),
    "road 4": (llama, lambda: peft.RoadConfig(variant="road_4", group_size=8, target_modules=LINEAR), "RoAd"),
    "hira": (llama, lambda: peft.HiraConfig(r=3, rank_pattern={"v_proj": 2}, target_modules=LINEAR), "HiRA"),
    "hira of an embedding": (llama, lambda: peft.HiraConfig(r=3, target_modules=["embed_tokens", "q_proj"]), "HiRA"),
    "hira conv": (conv_net, lambda: peft.HiraConfig(r=3, target_modules=[*CONV, "head"]), "HiRA"),
    "miss": (llama, lambda: peft.MissConfig(r=5, target_modules=LINEAR), "ShardShare"),
    "miss mini": (llama, lambda: peft.MissConfig(r=5, mini_r=4, init_weights="mini", target_modules=LINEAR), "ShardShare"),
    "miss bat": (llama, lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=LINEAR), "BlockAffine"),
    "adalora": (
        llama,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=LINEAR),
        "GatedLoRA",
    ),
    "adalora without alpha": (
        llama,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=0, total_step=10, target_modules=LINEAR),
        "GatedLoRA",
    ),
    "adalora conv": (
        conv_net,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=7, total_step=10, target_modules=[*CONV, "head"]),
        "GatedLoRA",
    ),
}


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


def changed(folder: Path, tensors: dict[str, Tensor | None] | None = None, **fields: Any) -> None:
    """Rewrites some of an adapter's tensors and fields; None takes one away."""
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    stored = {**load_file(file), **(tensors or {})}
    save_file({key: tensor.contiguous() for key, tensor in stored.items() if tensor is not None}, file)


def stored(folder: Path, ending: str) -> tuple[str, Tensor]:
    """The first key with this ending, and its tensor."""
    return next(
        (key, tensor) for key, tensor in load_file(folder / "adapter_model.safetensors").items() if key.endswith(ending)
    )


def refused(folder: Path, message: str, make: Make = llama, error: type[Exception] = CheckpointError, **options: Any) -> None:
    """The import fails with this text and leaves the model as it was."""
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        rw.interop.from_peft(model, folder, **options)
    assert {name: torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert [parameter.requires_grad for parameter in model.parameters()] == training


ONE_OF_EACH = [
    *("loha", "loha conv tucker", "lokr", "lokr both", "lokr conv tucker", "oft exact", "oft shared", "boft", "hra", "ia3"),
    *("ia3 conv", "randlora", "fourierft", "c3a", "shira", "vblora", "gralora hybrid", "delora", "road 2", "hira"),
    *("miss", "miss mini", "miss bat", "adalora"),
]


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_tensors_of_other_sizes_missing_ones_and_unknown_ones_are_refused(case: str, tmp_path: Path) -> None:
    make, config, _ = CASES[case]
    folder = tmp_path / "a"
    saved(make, config(), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    copies = [key for key in tensors if ".randlora_A" in key or ".randlora_B" in key]
    site = [key for key in tensors if key.startswith("base_model.model.") and key not in copies]
    for key in site[:3] + copies[:2]:
        tensor = tensors[key]
        for axis in range(tensor.dim()):
            if tensor.shape[axis] > 1:
                changed(folder, {key: tensor.narrow(axis, 0, tensor.shape[axis] - 1)})
                refused(folder, ".", make, RankwiseError)
        changed(folder, {key: tensor[None].expand(2, *tensor.shape)})
        refused(folder, ".", make, RankwiseError)
        if key in site:
            changed(folder, {key: None})
            refused(folder, "and needs|names [346] layers|which does not fit", make)
        changed(folder, {key: tensor})
    stranger = f"{site[0]}_of_another_kind"
    changed(folder, {stranger: torch.ones(2)})
    refused(folder, r"1 of \d+ tensors belong to nothing that a [A-Z0-9]+ adapter has", make)
    changed(folder, {stranger: None})
    rw.interop.from_peft(make(), folder)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("loha", {"r": 4}, "rank 3 in adapter_model.safetensors and rank 4 in adapter_config.json"),
        ("loha", {"r": 0}, "r is 0, and takes whole numbers from 1 on"),
        ("loha", {"r": True}, "takes whole numbers"),
        ("loha", {"alpha": "many"}, "alpha is 'many', and takes numbers"),
        ("loha", {"alpha_pattern": {"q_proj": None}}, "alpha or alpha_pattern is 7, None, and takes numbers"),
        ("loha", {"alpha_pattern": {"(": 3}}, "no regular expression"),
        ("loha", {"use_effective_conv2d": "yes"}, "use_effective_conv2d is 'yes', and takes true or false"),
        ("loha", {"rank_dropout": 0.1}, r"rank_dropout=0.1 .*in training alone, so pass trainable=False"),
        ("loha", {"new_trick": 3}, "new_trick=3 .a field that this rankwise does not know"),
        ("lokr", {"decompose_factor": 2}, "not those that the config makes for this layer.*C is .* in the file and .* here"),
        ("lokr", {"decompose_both": True, "decompose_factor": 3}, "are not those that the config makes"),
        ("oft exact", {"oft_block_size": 8}, "oft_block_size 4 in adapter_model.safetensors and oft_block_size 8"),
        ("oft exact", {"block_share": True}, "24 numbers here, and oft_R is .6, 6.: 6 blocks of 4, shared"),
        ("oft shared", {"block_share": False}, "1 block of 4"),
        ("oft exact", {"oft_block_size": ...}, "OFT of peft before 0.14"),
        ("boft", {"boft_block_size": 2}, "boft_block_size 4 in .* and boft_block_size 2"),
        ("boft by the number of blocks", {"boft_block_num": 2}, "boft_block_num 4 in .* and boft_block_num 2"),
        ("hra", {"r": 2}, "rank 4 in .* and rank 2"),
        ("ia3", {"feedforward_modules": []}, r"ia3_l \(1, 24\) of .*down_proj scales its inputs, and by feedforward_modules"),
        ("ia3", {"feedforward_modules": ["v_proj", "down_proj"]}, "v_proj scales its outputs, and .* its inputs"),
        ("randlora", {"r": 4}, "rank 3 in .* and rank 4"),
        ("fourierft", {"n_frequency": 21}, "n_frequency 20 in .* and n_frequency 21"),
        ("fourierft", {"n_frequency_pattern": {"v_proj": 7}}, "v_proj has n_frequency 20 in .* and n_frequency 7"),
        ("c3a", {"block_size": 4}, "block_size 8 in .* and block_size 4"),
        ("shira", {"r": 3}, r"80 entries, and r = 3 of the config makes r · \(m \+ n\) = 120 on this layer, 16×24"),
        ("vblora", {"num_vectors": 13}, "num_vectors 12 in .* and num_vectors 13"),
        ("vblora", {"vector_length": 8}, r"vblora_vector_bank is \(12, 4\) in the file; .* need \(12, 8\)"),
        ("vblora", {"save_only_topk_weights": True}, "in training alone, so pass trainable=False"),
        ("gralora", {"hybrid_r": 2}, "has gralora_A, gralora_B and needs gralora_A, gralora_A_general"),
        ("gralora", {"gralora_k": 4}, "gralora_k 2 in .* and gralora_k 4"),
        ("delora", {"r": 5}, "rank 3 in .* and rank 5"),
        ("road 2", {"variant": "road_3"}, "variant='road_3'"),
        ("road 2", {"variant": "road_1"}, "are not those that the config makes"),
        ("hira", {"r": 5}, "rank 3 in .* and rank"),
        ("hira", {"hira_dropout": 0.1}, "in training alone, so pass trainable=False"),
        ("miss", {"init_weights": "bat"}, r"miss_block is \(5, 16\), which does not fit"),
        ("miss bat", {"init_weights": True}, r"miss_block is \(4, 4, 4\), which does not fit"),
        ("miss mini", {"mini_r": 8}, "mini_r 4 in .* and mini_r 8"),
        ("miss", {"init_weights": "maxi"}, "init_weights='maxi'"),
        ("adalora", {"init_r": 5}, "rank 4 in .* and rank 5"),
        (
            "adalora",
            {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}},
            "one true or false for each of init_r = 4",
        ),
        ("adalora", {"use_dora": True}, "use_dora=True"),
        ("adalora", {"init_lora_weights": "pissa"}, "path_initial_model"),
        ("miss", {"peft_type": "BONE"}, "rename the keys bone_block to miss_block"),
        ("miss", {"peft_type": "LN_TUNING"}, "load it with peft, and save the model"),
        ("miss", {"peft_type": "XLORA"}, "peft_type 'XLORA'; rankwise reads LORA, ADALORA, VERA, .*save_as_lora"),
    ],
)
def test_a_config_that_contradicts_the_file_or_is_not_understood_is_refused(
    case: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make, config, _ = CASES[case]
    saved(make, config(), tmp_path)
    changed(tmp_path, **fields)
    refused(tmp_path, message, make)


# -- what single types need --------------------------------------------------------------------------------------------------


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
