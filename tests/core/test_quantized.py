"""Adapters on quantized layers: the base stays in its codes, adapters act beside it, nothing is written into it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import FingerprintError, MergeError, RankwiseError, StatisticsError, TargetError
from rankwise.core.statistics import Statistic
from rankwise.core.targets import dequantize, is_quantized
from tests.core.quantized import BACKENDS, inputs, library, plain, quantize

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # it casts to half precision inside


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> str:
    return request.param


def scatter(handle: rankwise.Handle) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


def step(model: nn.Module, handle: rankwise.Handle) -> Tensor:
    optimizer = handle.optimizer(lr=1e-2)
    loss = model(inputs()).square().mean()
    loss.backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()
    return loss.detach()


def test_a_quantized_layer_gives_its_numbers_and_sizes(backend: str) -> None:
    before, model = plain(), quantize(plain(), backend)
    for name in ("0", "2"):
        layer, original = model.get_submodule(name), before.get_submodule(name).weight
        assert is_quantized(layer) and not is_quantized(before.get_submodule(name))
        weight = dequantize(layer)
        assert weight.shape == original.shape and weight.is_floating_point()
        assert 1e-3 < (weight - original).norm() / original.norm() < 0.12  # the error of 8 and of 4 bits
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=2))
    assert {site: (target.m, target.n) for site, target in handle.targets.items()} == {"0": (32, 64), "2": (64, 32)}


@pytest.mark.parametrize("recipe", ["lora(rank=2)", "lora_fa(rank=2)", "vera(rank=4)", "lora_xs(rank=2)", "bone(rank=8)"])
def test_an_additive_method_runs_beside_the_layers_own_forward(backend: str, recipe: str, monkeypatch: Any) -> None:
    model, x = quantize(plain(), backend), inputs()
    base = [model.get_submodule(name)(rows).detach() for name, rows in (("0", x), ("2", x[:, :32]))]
    handle = rankwise.adapt_(model, rankwise.compose(recipe))
    scatter(handle)
    monkeypatch.setattr("rankwise.core.bindings.dequantize", None)  # no forward may ask for the numbers
    for name, rows, expected in zip(("0", "2"), (x, x[:, :32]), base, strict=True):
        update = handle.update_of(name).dense()
        torch.testing.assert_close(model.get_submodule(name)(rows), expected + rows @ update.t(), rtol=1e-4, atol=1e-5)
    assert step(model, handle) > step(model, handle)


def test_a_scaled_method_asks_for_the_numbers_once_per_layer(backend: str, monkeypatch: Any) -> None:
    model, x = quantize(plain(), backend), inputs()
    expected = model(x).detach()
    handle = rankwise.adapt_(model, rankwise.catalog.dora(rank=2))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    scatter(handle)
    asked: list[nn.Module] = []

    def counting(layer: nn.Module) -> Tensor:
        asked.append(layer)
        return dequantize(layer)

    monkeypatch.setattr("rankwise.core.bindings.dequantize", counting)
    entry, layer = handle.parameterization("0"), model[0]  # type: ignore[index]
    inner = entry.inner
    y = layer(x)
    assert asked == [layer]
    direction = dequantize(layer) + entry.scale * (inner.B @ inner.A)
    gain = entry.magnitude / direction.norm(dim=1)
    with rankwise.switched_off(model):
        own = layer(x) - layer.bias
    want = gain * (own + entry.scale * (x @ inner.A.t() @ inner.B.t())) + layer.bias
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    assert step(model, handle) > step(model, handle)


def test_merging_and_absorbing_are_refused_and_change_nothing(backend: str) -> None:
    model, x = quantize(plain(), backend), inputs()
    codes = dequantize(model[0]).clone()  # type: ignore[index]
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=2))
    scatter(handle)
    expected = model(x)
    with pytest.raises(MergeError, match=r"0 is quantized .*load the base dequantized to merge"):
        handle.merge_()
    assert torch.equal(model(x), expected)
    handle.detach_()
    with pytest.raises(MergeError, match="mode='offset'"):
        rankwise.adapt_(model, rankwise.catalog.pissa(rank=2, mode="absorb"))
    assert torch.equal(dequantize(model[0]), codes) and not hasattr(model[0], "adapter")  # type: ignore[index]
    expected = model(x)
    rankwise.adapt_(model, rankwise.catalog.pissa(rank=2))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_restart_keeps_the_past_beside_the_codes(backend: str) -> None:
    model, x = quantize(plain(), backend), inputs()
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2) + relora(interval=2)"))
    optimizer = handle.optimizer(lr=1e-2)
    outputs = []
    for _ in range(2):
        model(x).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        outputs.append(model(x).detach())
        handle.after_step()
        optimizer.zero_grad()
    torch.testing.assert_close(model(x), outputs[-1], rtol=1e-4, atol=1e-5)
    assert handle.low_rank_of("0").rank == 4


def test_a_saved_adapter_goes_onto_a_freshly_quantized_base_and_onto_no_other(backend: str, tmp_path: Path) -> None:
    model, x = quantize(plain(), backend), inputs()
    handle = rankwise.adapt_(model, rankwise.catalog.dora(rank=2))
    step(model, handle)
    expected = model(x)
    handle.save(tmp_path)
    fresh = quantize(plain(), backend)
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(x), expected)
    for other in (plain(), quantize(plain(seed=1), backend)):
        with pytest.raises(FingerprintError, match="2 of 2 weights differ"):
            rankwise.load_(other, tmp_path)


def test_what_needs_numbers_in_the_weight_says_so(backend: str) -> None:
    model = quantize(plain(), backend)
    recipe = rankwise.catalog.lora(rank=2)
    with pytest.raises(TargetError, match=r"0 is quantized.*use binding='path'"):
        rankwise.adapt_(model, recipe, binding="weight")
    pairs = [(inputs(), torch.arange(5))]
    with pytest.raises(StatisticsError, match=r"0: a quantized weight .* has no gradient; collect on the model before"):
        rankwise.collect(model, pairs, {Statistic.GRADIENT})
    rankwise.adapt_(model, recipe)
    with pytest.raises(TargetError, match="cannot be exchanged"):
        rankwise.effective_weights(model)


def test_statistics_of_the_model_before_quantizing_fit(backend: str) -> None:
    before, model, x = plain(), quantize(plain(), backend), inputs()
    recipe = rankwise.catalog.lora_one(rank=2)
    statistics = rankwise.collect(before, [(x, torch.arange(5))], recipe.needs)
    expected = model(x)
    handle = rankwise.adapt_(model, recipe, statistics=statistics)
    assert (model(x) - expected).norm() > 1e-4 * expected.norm()
    assert handle.low_rank_of("0").rank == 2


def test_codes_of_an_unknown_kind_are_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int16), requires_grad=False)
    with pytest.raises(RankwiseError, match=r"Linear keeps its weight as torch\.int16"):
        dequantize(layer)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torchao int8", "bitsandbytes nf4"])
def test_the_packaged_language_model_quantized(backend: str, tmp_path: Path) -> None:
    library("transformers")
    from rankwise.lab.models import CAUSAL, load_model

    loaded = load_model("packaged:smollm2", CAUSAL)
    loaded.model.model.layers = loaded.model.model.layers[:4]
    tokens = loaded.processor("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, fresh = quantize(loaded.model, backend), quantize(loaded.model, backend)

    def loss(net: nn.Module) -> Tensor:
        return net(input_ids=tokens, labels=tokens).loss

    with torch.no_grad():
        assert loss(model) == pytest.approx(loss(loaded.model).item(), rel=0.1)
    handle = rankwise.adapt_(model, rankwise.catalog.dora(rank=4), where=["q_proj", "v_proj", "down_proj"])
    optimizer = handle.optimizer(lr=1e-3)
    seen = []
    for _ in range(3):
        value = loss(model)
        value.backward()
        seen.append(value.item())
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert loss(model) < seen[0]
        expected = model(input_ids=tokens).logits
        handle.save(tmp_path)
        rankwise.load_(fresh, tmp_path)
        torch.testing.assert_close(fresh(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(MergeError, match="is quantized"):
        handle.merge_()
