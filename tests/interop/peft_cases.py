"""Adapters of every type of PEFT on small models, and what the tests of reading them share."""

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
from rankwise.core.errors import CheckpointError
from tests.interop.models import conv_net, images, llama, stir, tokens

peft = pytest.importorskip("peft")

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
