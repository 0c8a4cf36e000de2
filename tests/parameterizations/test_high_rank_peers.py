"""The same factors in PEFT's and LyCORIS's own layers give the same outputs as here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise

LOHA = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}
LOHA_TUCKER = {
    "hada_w1_a": "P1",
    "hada_w1_b": "Q1",
    "hada_t1": "T1",
    "hada_w2_a": "P2",
    "hada_w2_b": "Q2",
    "hada_t2": "T2",
}
LOKR = {"lokr_w1": "C", "lokr_w1_a": "C_B", "lokr_w1_b": "C_A", "lokr_w2": "D", "lokr_w2_a": "D_B", "lokr_w2_b": "D_A"}
LOKR_TUCKER = {"lokr_w1": "C", "lokr_t2": "T", "lokr_w2_a": "P", "lokr_w2_b": "Q"}
HIRA = {"hira_A": "A", "hira_B": "B", "hira_embedding_A": "A", "hira_embedding_B": "B"}
GRALORA = {"gralora_A": "block_A", "gralora_B": "block_B", "gralora_A_general": "A", "gralora_B_general": "B"}

LINEAR, CONV, EMBEDDING = (48, 32), (6, 4, 3), "embedding"
CASES: list[tuple[Any, str, dict[str, Any], str, Mapping[str, str]]] = [
    (LINEAR, "LoHaConfig", {"r": 3, "alpha": 5}, "loha(rank=3, alpha=5)", LOHA),
    (LINEAR, "LoHaConfig", {"r": 8, "alpha": 5}, "loha(rank=8, alpha=5)", LOHA),
    (CONV, "LoHaConfig", {"r": 3, "alpha": 5}, "loha(rank=3, alpha=5)", LOHA),
    (CONV, "LoHaConfig", {"r": 3, "use_effective_conv2d": True}, "loha(rank=3, alpha=8, tucker=True)", LOHA_TUCKER),
    (LINEAR, "LoKrConfig", {"r": 2, "alpha": 5}, "lokr(rank=2, alpha=5)", LOKR),
    (LINEAR, "LoKrConfig", {"r": 2, "decompose_both": True}, "lokr(rank=2, alpha=8, decompose_both=True)", LOKR),
    (LINEAR, "LoKrConfig", {"r": 100, "alpha": 7}, "lokr(rank=100, alpha=7)", LOKR),
    (LINEAR, "LoKrConfig", {"r": 2, "decompose_factor": 4}, "lokr(rank=2, alpha=8, factor=4)", LOKR),
    (CONV, "LoKrConfig", {"r": 1, "alpha": 2}, "lokr(rank=1, alpha=2)", LOKR),
    (CONV, "LoKrConfig", {"r": 1, "use_effective_conv2d": True}, "lokr(rank=1, alpha=8, tucker=True)", LOKR_TUCKER),
    (LINEAR, "HiraConfig", {"r": 3}, "hira(rank=3)", HIRA),
    (CONV, "HiraConfig", {"r": 3}, "hira(rank=3)", HIRA),
    (EMBEDDING, "HiraConfig", {"r": 3}, "hira(rank=3)", HIRA),
    (LINEAR, "GraloraConfig", {"r": 4, "gralora_k": 2, "alpha": 3}, "gralora(rank=4, alpha=3)", GRALORA),
    (
        LINEAR,
        "GraloraConfig",
        {"r": 4, "gralora_k": 4, "alpha": 3, "hybrid_r": 2},
        "gralora(rank=4, alpha=3, blocks=4, hybrid_rank=2)",
        GRALORA,
    ),
    (LINEAR, "FourierFTConfig", {"n_frequency": 4}, "fourierft(frequencies=4)", {"fourierft_spectrum": "coefficients"}),
    (LINEAR, "FourierFTConfig", {"n_frequency": 200}, "fourierft(frequencies=200)", {"fourierft_spectrum": "coefficients"}),
    (LINEAR, "C3AConfig", {"block_size": 16}, "c3a(block=16)", {"c3a_kernel": "kernel"}),
    (LINEAR, "C3AConfig", {"block_size": 8}, "c3a(block=8)", {"c3a_kernel": "kernel"}),
    (LINEAR, "ShiraConfig", {"r": 3}, "shira(rank=3)", {"shira_weight": "values", "shira_indices": "indices"}),
]


def model_and_input(size: Any) -> tuple[nn.Sequential, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if size == EMBEDDING:
            return nn.Sequential(nn.Embedding(12, 8)), torch.randint(12, (3, 5), generator=generator)
        if len(size) == 3:
            out, channels, kernel = size
            return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=1)), torch.randn(
                2, channels, 5, 6, generator=generator
            )
        return nn.Sequential(nn.Linear(size[1], size[0])), torch.randn(2, 5, size[1], generator=generator)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of PEFT's own sparse tensors
@pytest.mark.parametrize(("size", "config", "options", "text", "names"), CASES, ids=lambda value: str(value)[:40])
def test_outputs_are_those_of_peft(
    size: Any, config: str, options: dict[str, Any], text: str, names: Mapping[str, str]
) -> None:
    import peft

    model, x = model_and_input(size)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(copy.deepcopy(model), getattr(peft, config)(target_modules=["0"], **options))
    layer: Any = theirs.base_model.model[0]
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    entry, block = handle.parameterization("0"), handle.blocks()["0"]
    generator, filled = torch.Generator().manual_seed(2), set()
    with torch.no_grad():
        for name, role in names.items():
            held = getattr(layer, name)
            held = dict(held.items()).get("default")
            if held is None or isinstance(held, nn.Identity):
                continue
            tensor: Tensor = getattr(held, "weight", held)
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            target = getattr(entry, role)
            target.copy_(tensor.reshape(target.shape).to(target.dtype))
            filled.add(role)
    assert filled >= set(block), "every trained tensor was filled"
    expected = theirs.eval()(x)
    for output in (model(x), model.eval()(x)):
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_fourierft_takes_the_positions_of_peft() -> None:
    import peft

    model = nn.Sequential(nn.Linear(8, 12))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.FourierFTConfig(target_modules=["0"], n_frequency=9))
    handle = rankwise.adapt_(model, rankwise.compose("fourierft(frequencies=9)"), where=["0"])
    layer: Any = theirs.base_model.model[0]
    assert torch.equal(handle.parameterization("0").positions, layer.indices["default"])


@pytest.mark.parametrize(("rank", "alpha", "factor"), [(100, 1.0, 4), (100, 1.0, -1), (2, 5.0, 4)])
def test_lokr_is_lycoris_with_the_scale_of_whole_factors_one(rank: int, alpha: float, factor: int) -> None:
    modules = pytest.importorskip("lycoris.modules.lokr", reason="lycoris-lora is not installed")
    model, x = model_and_input(LINEAR)
    layer = copy.deepcopy(model[0])
    theirs = modules.LokrModule("layer", layer, multiplier=1.0, lora_dim=rank, alpha=alpha, factor=factor)
    text = f"lokr(rank={rank}, alpha={alpha}, factor={factor}, full_scale='one', zero='D')"
    entry = rankwise.adapt_(model, rankwise.compose(text), where=["0"]).parameterization("0")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for name, role in LOKR.items():
            tensor = getattr(theirs, name, None)
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
                getattr(entry, role).copy_(tensor)
    theirs.apply_to()
    expected = layer(x)
    assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert entry.scale == (1.0 if rank == 100 else alpha / rank)
