"""Files of every adapter type of PEFT that must be refused: other sizes, missing or unknown tensors, fields that disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rankwise as rw
from rankwise.core.errors import RankwiseError
from tests.interop.peft_cases import (
    CASES,
    changed,
    refused,
    saved,
)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and transformers warn about themselves


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
