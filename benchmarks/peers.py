"""Every parameterization of the catalog on the benchmark's model, and next to it PEFT's or LyCORIS's figure where they have it.

Sizes are the method's own where they fit the model's layers (512 and 1376 = 32·43 wide), the benchmark's rank elsewhere.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import rankwise
from benchmarks.model import LINEARS, RANK, Variant, leave_start, ours, theirs

BLOCK = 32  # divides both widths
# slug -> arguments that differ from the defaults, beside rank=16 where there is a rank
OURS: Mapping[str, Mapping[str, Any]] = {
    "vera": {"rank": 256},
    "randlora": {"rank": 32},
    "oft": {"block": BLOCK},
    "c3a": {"block": BLOCK},
    "road": {"group": BLOCK},
    "vblora": {"rank": 4, "length": BLOCK},
    "nola": {"rank": 8, "bases_A": 64, "bases_B": 64},
    "pmss": {"rank": 64},
    "svfit": {"rank": 128},
    "loldu": {"rank": 128},
    "nested_nora": {"rank": RANK, "outer_rank": 64},
    "eigenlorax": {"adapters": (), "components": 0, "random_components": 32},
    "batched_flora": {"rank": 1},
    "aflora": {"rank": RANK, "total_steps": 100, "epochs": 20},
}
# slug -> PEFT's configuration class and arguments for the same maths and sizes
PEFT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "lora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK}),
    "rslora": ("LoraConfig", {"r": RANK, "lora_alpha": 16, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK, "use_dora": True}),
    "vera": ("VeraConfig", {"r": 256}),
    "bone": ("MissConfig", {"r": RANK}),
    "loha": ("LoHaConfig", {"r": RANK, "alpha": RANK}),
    "lokr": ("LoKrConfig", {"r": RANK, "alpha": RANK}),
    "oft": ("OFTConfig", {"oft_block_size": BLOCK, "use_cayley_neumann": False}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 1}),
    "hra": ("HRAConfig", {"r": RANK}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000}),
    "c3a": ("C3AConfig", {"block_size": BLOCK}),
    "shira": ("ShiraConfig", {"r": RANK}),
    "vblora": ("VBLoRAConfig", {"r": 4, "vector_length": BLOCK, "num_vectors": 256, "topk": 2}),
    "gralora": ("GraloraConfig", {"r": RANK, "alpha": 64, "gralora_k": 2}),
    "delora": ("DeloraConfig", {"r": RANK}),
    "road": ("RoadConfig", {"variant": "road_1", "group_size": BLOCK}),
    "hira": ("HiraConfig", {"r": RANK}),
}
LYCORIS: Mapping[str, Mapping[str, Any]] = {
    "loha": {"algo": "loha", "linear_dim": RANK, "linear_alpha": RANK},
    "lokr": {"algo": "lokr", "linear_dim": RANK, "linear_alpha": RANK, "factor": -1},
}


def catalog_variants() -> list[Variant]:
    """All rows: ours, then the peers' of the same method."""
    rows = []
    for slug in rankwise.catalog.names("parameterization"):
        function = rankwise.catalog.entry(slug).make
        arguments: dict[str, Any] = dict(OURS.get(slug, {}))
        if "rank" in inspect.signature(function).parameters:
            arguments.setdefault("rank", RANK)
        said = ", ".join(f"{key}={value}" for key, value in arguments.items() if not isinstance(value, tuple))
        rows.append(ours(f"{slug}({said})", function(**arguments), 1.5))
        if slug in PEFT:
            kind, options = PEFT[slug]
            rows.append(theirs(slug, kind, options))
        if slug in LYCORIS:
            rows.append(_lycoris(slug, LYCORIS[slug]))
    return rows


def _lycoris(slug: str, options: Mapping[str, Any]) -> Variant:
    def make(model: nn.Module) -> tuple[nn.Module, Any]:
        from lycoris import LycorisNetwork, create_lycoris

        LycorisNetwork.apply_preset({"target_module": [], "target_name": [f".*{name}" for name in LINEARS]})
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            network = create_lycoris(model, 1.0, **options)
        network.apply_to()
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        model.add_module("lycoris", network)
        leave_start(model)
        return model, None

    return Variant(slug, "LyCORIS", make)
