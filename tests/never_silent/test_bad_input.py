"""Bad input, each with the message that a person reads: what was asked, what was found, and the way out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError, DataError, MergeError, RecipeError, TrainingError
from rankwise.core.recipe import Recipe
from rankwise.core.statistics import Statistic
from rankwise.lab.compare import run_compare
from rankwise.lab.data import load_data
from tests.lab.tiny_task import TinyTask
from tests.never_silent.models import adapted, inputs, mlp


@pytest.mark.parametrize("recipe", ["lora(rank=9)", "dora(rank=9)", "lora_xs(rank=9)", "gated_lora(rank=9)", "lora(rank=0)"])
def test_a_rank_that_does_not_fit_the_layer(recipe: str) -> None:
    net = mlp()
    rank = recipe[-2]
    with pytest.raises(RecipeError) as refused:
        rankwise.adapt_(net, rankwise.compose(recipe))
    message = str(refused.value)
    assert f"rank is {rank} for a layer of 8 × 8" in message and "use rank=8 or less" in message
    assert len(refused.value.problems) == 2, "every layer is named at once"
    assert list(net.state_dict()) == list(mlp().state_dict()) and all(p.requires_grad for p in net.parameters())


def test_a_projection_wider_than_the_layer() -> None:
    with pytest.raises(RecipeError, match=r"step galore needs 1 <= rank <= min\(m, n\) = 8; rank is 9 for a layer of 8 × 8"):
        rankwise.adapt_(mlp(), rankwise.compose("full + galore(rank=9)"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "no method 'lorra' in the catalog. Did you mean 'lora'"),
        ("lora(rnak=4)", "lora has no argument 'rnak'. Did you mean 'rank'?"),
        ("lora + sam2", "no method 'sam2' in the catalog. Did you mean 'sam'"),
        ("adalora", "adalora needs total_steps: write adalora(total_steps=…)"),
        ("svd(rank=4)", "svd is on the shelf 'merging'"),
        ("lora(4)", "write names joined by +"),
        ("lora(rank=", "is no recipe"),
    ],
)
def test_an_unknown_method_or_argument(text: str, said: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        rankwise.compose(text)
    assert said in str(refused.value)


def test_an_unknown_argument_of_a_step() -> None:
    handle = rankwise.adapt_(mlp(), rankwise.compose("lora(rank=2)"))
    with pytest.raises(ArgumentError, match=r"no step of 'lora\(rank=2\)' has an argument 'weight_dacay'.*'weight_decay'"):
        handle.optimizer(lr=1e-3, weight_dacay=0.1)


def test_merging_twice() -> None:
    net = mlp()
    handle = adapted(net)
    handle.merge_()
    merged = net(inputs())
    with pytest.raises(
        MergeError, match=r"'default' is merged already; call unmerge_\(\) first, merging twice would add it twice"
    ):
        handle.merge_()
    assert torch.equal(net(inputs()), merged)
    handle.unmerge_()
    with pytest.raises(MergeError, match="is not merged, so there is nothing to take out"):
        handle.unmerge_()


def test_two_adapters_with_one_name() -> None:
    net = mlp()
    first = adapted(net)
    before = net(inputs())
    with pytest.raises(ArgumentError, match=r"'default' is on this model already \(there are: default\); choose another name="):
        rankwise.adapt_(net, rankwise.compose("lora(rank=2)"))
    assert torch.equal(net(inputs()), before) and first.trained_numbers == 64


@pytest.mark.parametrize("name", ["merged", "active", "run", "keys", "a.b", "class", ""])
def test_a_name_that_cannot_be(name: str) -> None:
    with pytest.raises(ArgumentError, match="cannot be an adapter's name"):
        rankwise.adapt_(mlp(), rankwise.compose("lora(rank=2)"), name=name)


def test_nan_in_the_gradient_names_the_tensor_and_leaves_the_weights() -> None:
    net = mlp()
    handle = adapted(net)
    handle.optimizer(lr=1e-2)
    before = {role: tensor.clone() for role, tensor in handle.blocks()["1"].items()}
    (net(inputs()).sum() * float("nan")).backward()
    with pytest.raises(TrainingError, match=r"step 0: the gradient of 0\.[AB] holds NaN or infinity.*lower the learning rate"):
        handle.after_backward()
    assert all(torch.equal(tensor, before[role]) for role, tensor in handle.blocks()["1"].items())


def test_nan_in_the_probe_data() -> None:
    bad = inputs().clone()
    bad[2, 3] = float("nan")
    with pytest.raises(TrainingError, match="the loss of probe batch 1 is nan; look at that batch"):
        rankwise.collect(mlp(), [(inputs(), torch.arange(5)), (bad, torch.arange(5))], {Statistic.GRADIENT})


def test_nan_in_the_inputs_of_a_start() -> None:
    """Moments need no loss, so a NaN must be found on its way into the factors."""
    net, bad = mlp(), inputs().clone()
    bad[2, 3] = float("nan")
    recipe = rankwise.compose("eva(rank=2)")
    with pytest.raises(rankwise.RankwiseError, match="NaN"):
        statistics = rankwise.collect(net, [(bad, torch.arange(5))], recipe.needs)
        rankwise.adapt_(net, recipe, statistics=statistics)
    assert list(net.state_dict()) == list(mlp().state_dict())


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"thesis\.txt"):
        run_compare(TinyTask(), ["lora(rank=2)"], out=full, steps=4, seeds=1)
    assert [entry.name for entry in full.iterdir()] == ["thesis.txt"] and (full / "thesis.txt").read_text() == "mine"


def rows(path: Path, columns: list[str], values: list[list[str]]) -> str:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *values])
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json"])
def test_an_empty_data_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_text("")
    with pytest.raises(DataError, match=r"rows\.\w+ is empty"):
        load_data(str(path))


def test_a_data_file_with_a_header_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.csv has no rows"):
        load_data(rows(tmp_path / "rows.csv", ["text", "label"], []))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.csv", ["sentence", "mood"], [["good", "1"], ["bad", "0"], ["fine", "1"]])
    with pytest.raises(DataError, match=r"has no column 'modd'\. Did you mean 'mood'\? Its columns: sentence, mood"):
        load_data(path, columns={"text": "sentence", "label": "modd"})
    with pytest.raises(ArgumentError, match=r"rows have no part 'lable'\. Did you mean 'label'"):
        load_data(path, columns={"text": "sentence", "lable": "mood"})


def test_a_row_without_the_named_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    held = [{"text": "good", "label": "1"}, {"text": "bad", "label": "0"}, {"text": "lost"}, {"text": "fine", "label": "1"}]
    path.write_text("\n".join(map(json.dumps, held)))
    with pytest.raises(DataError, match=r"row 3.*'label'"):
        load_data(str(path))


def test_a_label_unseen_in_training(tmp_path: Path) -> None:
    train = rows(tmp_path / "train.csv", ["text", "label"], [["good", "up"], ["bad", "down"], ["fine", "up"]])
    test = rows(tmp_path / "test.csv", ["text", "label"], [["so so", "middling"], ["good", "up"]])
    with pytest.raises(DataError, match=r"'middling' to evaluate on never occurs in the 3 rows to train on.*down, up"):
        load_data(train, evaluation=test)


def test_a_recipe_of_a_future_version() -> None:
    data = rankwise.compose("lora(rank=2)").to_json()
    with pytest.raises(CheckpointError, match="the recipe has format 2, this rankwise reads up to 1; upgrade rankwise"):
        Recipe.from_json({**data, "format": 2})
    with pytest.raises(CheckpointError, match="this is not a recipe"):
        Recipe.from_json({**data, "format": "1"})


def test_a_recipe_with_a_method_of_a_later_version(tmp_path: Path) -> None:
    """The format is known but the method is not: the message names it, and nothing is put onto the model."""
    adapted(mlp()).save(tmp_path)
    path = tmp_path / "adapter.json"
    held = json.loads(path.read_text())
    held["recipe"]["parameterization"]["name"] = "LoRAOfTomorrow"
    path.write_text(json.dumps(held))
    net: nn.Module = mlp()
    with pytest.raises(rankwise.RankwiseError, match="unknown parameterization 'LoRAOfTomorrow'"):
        rankwise.load_(net, tmp_path)
    assert list(net.state_dict()) == list(mlp().state_dict())
