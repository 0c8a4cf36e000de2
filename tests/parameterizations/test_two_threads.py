"""Two threads of one layer: the contract on both, routing of gradients, shapes on convolutions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.core.operators import LowRank
from rankwise.parameterizations.reference_conv import Viewed
from rankwise.parameterizations.two_threads import TwoThreads
from tests.contract.checks import ON_EVERY_LAYER, ON_ONE_LAYER, check_every_tensor_trains, name_of
from tests.contract.subjects import LAYERS, LINEAR, Subject, fits, inputs_of, model_of, scatter

SUBJECT = Subject("autolora_robust", rankwise.catalog.autolora_robust(rank=2))
KINDS = [kind for kind in LAYERS if fits(SUBJECT, kind)]
CHECKS = [check for check in ON_EVERY_LAYER if check is not check_every_tensor_trains]
# One has a loop of its own, one reads a file, which has no thread, and one is about the update as deployed.
OF_ONE_THREAD = ("check_base_untouched", "check_save_load", "check_queries_agree_with_dense")
OF_BOTH = [check for check in CHECKS if check.__name__ not in OF_ONE_THREAD]


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_contract(kind, check) -> None:
    if check.__name__ == "check_base_untouched":  # its loop is a plain loss, which the procedure refuses
        check(Subject("two threads", dataclasses.replace(SUBJECT.recipe, procedure=None)), kind)
        return
    check(SUBJECT, kind)


@pytest.mark.parametrize("check", ON_ONE_LAYER[:2], ids=name_of)
def test_contract_on_one_layer(check) -> None:
    check(SUBJECT, LINEAR)


@pytest.mark.parametrize("check", OF_BOTH, ids=name_of)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in ("Linear", "Conv2d grouped", "Conv1d")])
def test_contract_on_the_natural_thread(kind, check, monkeypatch) -> None:
    begin = TwoThreads.__init__

    def natural(self, *arguments, **keywords) -> None:
        begin(self, *arguments, **keywords)
        self.thread = "natural"

    monkeypatch.setattr(TwoThreads, "__init__", natural)
    check(SUBJECT, kind)


def test_the_kinds() -> None:
    assert {kind.name for kind in KINDS} == {kind.name for kind in LAYERS} - {"Embedding"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gradients_go_one_way_each_and_threads_start_equal(kind) -> None:
    model, x = model_of(kind), inputs_of(kind)
    expected = model(x)
    handle = rankwise.adapt_(model, SUBJECT.recipe, where=["layer"])
    entry = handle.parameterization("layer")
    assert entry.thread == "adversarial"
    outputs = {}
    for thread in ("natural", "adversarial"):
        entry.thread = thread
        outputs[thread] = model(x)
        torch.testing.assert_close(outputs[thread], expected, rtol=1e-12, atol=1e-12)
    scatter(handle)
    for thread, silent in (("natural", {"weight"}), ("adversarial", {"A", "B"})):
        entry.thread = thread
        model.zero_grad()
        model(x).square().sum().backward()
        for role, tensor in entry.roles().items():
            assert (tensor.grad is None) == (role in silent)
            assert role in silent or tensor.grad.any()


def test_the_branch_has_the_release_s_shapes_on_square_kernels_and_plain_ones_elsewhere() -> None:
    layers = {
        "1 x 1": nn.Conv2d(4, 6, 1),
        "3 x 3": nn.Conv2d(4, 6, 3),
        "3 x 1": nn.Conv2d(4, 6, (3, 1)),
        "flat": nn.Linear(4, 6),
    }
    model = nn.ModuleDict(layers).double()
    handle = rankwise.adapt_(model, rankwise.catalog.autolora_robust(rank=2, alpha=3.0), where=list(layers))
    scatter(handle)
    shapes = {name: {role: tuple(t.shape) for role, t in block.items()} for name, block in handle.blocks().items()}
    assert shapes["1 x 1"] == {"weight": (6, 4), "B": (6, 2), "A": (2, 4)}
    assert shapes["3 x 3"] == {"weight": (6, 36), "B": (18, 6), "A": (6, 12)}
    assert shapes["3 x 1"] == {"weight": (6, 12), "B": (6, 2), "A": (2, 12)}
    assert shapes["flat"] == {"weight": (6, 4), "B": (6, 2), "A": (2, 4)}
    for name, block in handle.blocks().items():
        branch = handle.parameterization(name).branch()
        assert isinstance(branch, Viewed if "x" in name and name != "3 x 1" else LowRank)
        product = (block["B"] @ block["A"]).reshape(block["weight"].shape) * 1.5
        torch.testing.assert_close(branch.dense(), product, rtol=1e-12, atol=1e-12)


def test_what_is_deployed_is_the_weight_alone(tmp_path) -> None:
    model, x = model_of(LINEAR), inputs_of(LINEAR)
    handle = rankwise.adapt_(model, SUBJECT.recipe, where=["layer"])
    scatter(handle)
    entry = handle.parameterization("layer")
    deployed = model(x)
    entry.thread = "natural"
    assert not torch.equal(model(x), deployed)
    handle.save(tmp_path)
    fresh = model_of(LINEAR)
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(x), deployed)
    entry.thread = "adversarial"
    with torch.no_grad():
        entry.B.zero_()
    assert torch.equal(model(x), deployed)
    with pytest.raises(ArgumentError, match="natural, adversarial, not 'nat'"):
        entry.thread = "nat"
