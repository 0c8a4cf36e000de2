"""`rankwise inspect` against dense linear algebra, on adapters of rankwise and PEFT, with and without the base."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError
from rankwise.lab import inspect_report
from rankwise.lab.inspect import inspect_adapter
from rankwise.lab.models import load_model
from tests.lab.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base")))


def adapted(base: str, recipe: str) -> rankwise.Handle:
    """An adapter with random numbers in every trained tensor."""
    handle = rankwise.adapt_(load_model(base, "causal-lm").model, rankwise.compose(recipe), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return handle


def weights(base: str) -> dict[str, torch.Tensor]:
    model = load_model(base, "causal-lm").model
    return {name: module.weight.detach().double() for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("recipe", ["lora(rank=3)", "dora(rank=3)", "lora_xs(rank=4)", "vera(rank=6)"])
def test_every_number_is_that_of_dense_linear_algebra(base: str, tmp_path: Path, recipe: str) -> None:
    handle = adapted(base, recipe)
    handle.save(tmp_path)
    found = inspect_adapter(tmp_path, base)
    frozen = weights(base)
    assert [layer.site for layer in found.layers] == list(handle.targets)
    for layer in found.layers:
        update = handle.update_of(layer.site).dense().detach().double()
        values = torch.linalg.svdvals(update)
        share = values / values.sum()
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-4)
        assert layer.relative_norm == pytest.approx(float(update.norm() / frozen[layer.site].norm()), rel=1e-4)
        assert layer.stable_rank == pytest.approx(float(update.norm() ** 2 / values[0] ** 2), rel=1e-4)
        assert layer.effective_rank == pytest.approx(float(torch.exp(-torch.xlogy(share, share).sum())), rel=1e-2)
        for cut, lost in layer.lost.items():
            assert lost == pytest.approx(float(values[cut:].square().sum() / values.square().sum()), abs=1e-4)
        left, _, _ = torch.linalg.svd(frozen[layer.site] + update)
        was, _, _ = torch.linalg.svd(frozen[layer.site], full_matrices=False)
        count = min(10, *update.shape)
        assert layer.intruders == int(((left[:, :count].t() @ was).abs().amax(1) < 0.5).sum())
    total = sum(layer.norm**2 for layer in found.layers)
    assert found.lost(1) == pytest.approx(sum(layer.norm**2 * layer.lost[1] for layer in found.layers) / total)


def test_imbalance_is_told_by_the_factors(base: str, tmp_path: Path) -> None:
    handle = adapted(base, "lora(rank=2)")
    for site in handle.targets:
        roles = handle.blocks()[site]
        with torch.no_grad():
            roles["A"].copy_(torch.eye(*roles["A"].shape))
            roles["B"].copy_(torch.eye(*roles["B"].shape) * (1.0 if "q_proj" in site else 2.0))
    handle.save(tmp_path)
    for layer in inspect_adapter(tmp_path).layers:
        assert layer.imbalance == pytest.approx(0.0 if "q_proj" in layer.site else 3.0 / 5.0, abs=1e-6)


def test_without_the_base_the_same_numbers_or_a_refusal(base: str, tmp_path: Path) -> None:
    for recipe in ("lora(rank=3)", "vera(rank=6)", "lora(rank=2) + pissa(rank=2)"):
        folder = tmp_path / re.sub(r"\W", "", recipe)
        adapted(base, recipe).save(folder)
        alone, based = inspect_adapter(folder), inspect_adapter(folder, base)
        assert {x.site: x.norm for x in alone.layers} == pytest.approx({x.site: x.norm for x in based.layers}, rel=1e-4)
        assert alone.layers[0].intruders is None
        assert "pass --base" in alone.notes[0]
    adapted(base, "dora(rank=2)").save(tmp_path / "dora")
    with pytest.raises(CheckpointError, match=r"cannot be read without the model .*pass --base MODEL"):
        inspect_adapter(tmp_path / "dora")
    with pytest.raises(CheckpointError, match="there is no folder"):
        inspect_adapter(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds no adapter .*Its run is not finished"):
        inspect_adapter(tmp_path / "run")
    with pytest.raises(ArgumentError, match="--task is one of"):
        inspect_adapter(tmp_path / "dora", base, task="chat")


@pytest.mark.filterwarnings("ignore")
def test_peft_adapters_are_read_too(base: str, tmp_path: Path) -> None:
    handle = adapted(base, "lora(rank=3)")
    handle.save(tmp_path / "ours")
    rankwise.interop.to_peft(handle, tmp_path / "theirs")
    ours = {layer.site: layer for layer in inspect_adapter(tmp_path / "ours").layers}
    for found in (inspect_adapter(tmp_path / "theirs"), inspect_adapter(tmp_path / "theirs", base)):
        assert {layer.site for layer in found.layers} == set(ours)
        for layer in found.layers:
            assert layer.norm == pytest.approx(ours[layer.site].norm, rel=1e-4)
            assert layer.stable_rank == pytest.approx(ours[layer.site].stable_rank, rel=1e-3)


def test_the_page_holds_every_layer_in_its_block_and_asks_nobody(base: str, tmp_path: Path) -> None:
    adapted(base, "lora(rank=3)").save(tmp_path)
    found = inspect_adapter(tmp_path, base)
    assert found.place("model.layers.1.self_attn.q_proj") == ("1", "self_attn.q_proj")
    inspect_report.write(found, tmp_path / "inspect.html")
    text = (tmp_path / "inspect.html").read_text()
    assert "default-src 'none'" in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL).group(1))  # type: ignore[union-attr]
    traces = {trace["meta"]: trace for trace in figures["layers"]["data"]}
    assert traces["norm of the update"]["y"] == ["block 0", "block 1"]
    column = traces["norm of the update"]["x"].index("mlp.up_proj")
    norms = {layer.site: layer.norm for layer in found.layers}
    assert traces["norm of the update"]["z"][1][column] == norms["model.layers.1.mlp.up_proj"]
    assert "intruder dimensions" in traces
    assert figures["cuts"]["data"][0]["x"] == ["rank 1", "rank 2"]


def test_a_narrow_terminal_leaves_columns_out_by_name_and_cuts_no_number(base: str, tmp_path: Path) -> None:
    adapted(base, "lora(rank=3)").save(tmp_path)
    found = inspect_adapter(tmp_path, base)
    for width in (80, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        inspect_report.show(found, console)
        shown = console.export_text()
        assert "…" not in shown
        assert ("Left out, since the terminal is narrow" in shown) == (width == 80)
        assert f"{found.layers[0].norm:.3g}" in shown
