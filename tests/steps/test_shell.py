"""The optimizer shell: state kept to the bit, frozen roles, compositions that work or are refused."""

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.core.step import chain
from rankwise.parameterizations.lora import LoRA
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.ratio import lora_plus
from rankwise.steps.scaled_gd import scaled_gd
from tests.steps.blocks import pair, step, train


def test_state_keeps_its_dtype_on_load():
    tensor = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = BlockOptimizer({"s": {"A": tensor}}, [adamw()], 0.1)
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    optimizer.state[tensor]["adamw.step"].fill_(257)  # bfloat16 has no 257
    optimizer.state[tensor]["adamw.exp_avg"] = torch.full((2, 2), 1 / 3)
    other = BlockOptimizer({"s": {"A": tensor}}, [adamw()], 0.1)
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert float(other.state[tensor]["adamw.step"]) == 257
    assert torch.equal(other.state[tensor]["adamw.exp_avg"], torch.full((2, 2), 1 / 3))
    other.state[tensor]["adamw.exp_avg"].zero_()  # a copy: what was saved stays
    assert float(saved["state"][0]["adamw.exp_avg"].sum()) > 1


def test_a_role_that_lost_its_state_starts_again_alone():
    B, A, M = pair()
    block, optimizer = train([adamw()], B, A, M, count=3)
    optimizer.state.pop(block["A"])
    step(optimizer, block, M)
    assert float(optimizer.state[block["A"]]["adamw.step"]) == 1
    assert float(optimizer.state[block["B"]]["adamw.step"]) == 4


def test_a_frozen_role_leaves_out_the_steps_that_need_it_and_keeps_the_moments():
    B, A, M = pair()
    block, optimizer = train([scaled_gd(), adamw(), lora_plus()], B, A, M, count=2)
    before = block["B"].detach().clone()
    block["A"].grad = None
    block["B"].grad = torch.ones_like(block["B"])
    optimizer.step()
    assert float(optimizer.state[block["B"]]["adamw.step"]) == 3
    assert not torch.equal(before, block["B"])


def test_repeated_steps_have_state_of_their_own():
    names = chain(adamw(), adamw()).init({"A": torch.ones(2)})["A"]
    assert {name.split(".")[0] for name in names} == {"adamw", "adamw2"}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("lora + scaled_gd + lora_plus", ["scaled_gd", "adamw", "lora_plus"]),
        ("rslora + reflora", ["reflora", "adamw"]),
        ("full + galore(rank=2)", ["galore"]),
        ("lora + sgd + scaled_gd", ["sgd", "scaled_gd"]),
        ("lora + adamw(weight_decay=0.1) + reflora", ["adamw", "reflora"]),
        ("galore(rank=2, inner=sgd)", ["galore"]),
    ],
)
def test_compositions_train(text, steps):
    recipe = rankwise.compose(text)
    assert [part.name for part in recipe.step] == steps
    assert Recipe.from_json(recipe.to_json()) == recipe
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 8, dtype=torch.float64)
    handle = rankwise.adapt_(model, recipe)
    optimizer = handle.optimizer(lr=0.05 if "sgd" in text else 0.005)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (lambda: rankwise.compose("lora + galore"), r"galore needs roles weight; LoRA trains A, B.\s+compose it with full"),
        (lambda: rankwise.compose("lora + scaled_gd + reflora"), "scaled_gd and reflora would both precondition"),
        (lambda: rankwise.compose("full + scaled_gd"), "scaled_gd needs roles A, B; Full trains weight"),
        (lambda: rankwise.compose("full + galore(rank=9)"), r"1 <= rank <= min\(m, n\) = 8; rank is 9"),
        (lambda: rankwise.compose("lora + adamw + sgd"), "exactly one step that makes the update"),
        (
            lambda: rankwise.compose("lora_plus", parameterization=piece(LoRA, freeze_input=True)),
            "lora_plus needs roles A, B; LoRA trains B",
        ),
    ],
)
def test_illegal_compositions_are_refused_with_reason_and_remedy(recipe, text):
    with pytest.raises(RecipeError, match=text):
        rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), recipe())


def test_catalog_refuses_an_inner_step_that_is_none():
    with pytest.raises(ArgumentError, match="inner is one step"):
        rankwise.compose("galore(inner=scaled_gd)")


def test_overrides_reach_their_step():
    handle = rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose("lora(rank=2) + lora_plus"))
    handle.optimizer(lr=0.1, ratio=4.0, weight_decay=0.1)
    with pytest.raises(ArgumentError, match=r"no step of .* has an argument 'ration'"):
        handle.optimizer(lr=0.1, ration=4.0)


def test_sgd_has_no_state():
    B, A, M = pair()
    block, optimizer = train([sgd()], B, A, M, count=2)
    assert not any(optimizer.state[tensor] for tensor in block.values())
