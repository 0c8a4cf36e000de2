"""nBAR and oBAR."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.perturbations.balance import Balance
from tests.core.training import Regression, assert_same_bits, numbers, open_gates


def pair(b: float, a: float, g_b: float | None, g_a: float | None) -> dict[str, nn.Parameter]:
    B, A = nn.Parameter(torch.full((4, 2), b, dtype=torch.float64)), nn.Parameter(torch.full((2, 4), a, dtype=torch.float64))
    B.grad = None if g_b is None else torch.full_like(B, g_b)
    A.grad = None if g_a is None else torch.full_like(A, g_a)
    return {"B": B, "A": A}


@pytest.mark.parametrize(
    ("kind", "numbers_", "grows"),
    [
        ("nbar", (1.0, 1.0, 2.0, 1.0), "B"),
        ("nbar", (1.0, 1.0, 1.0, 2.0), "A"),
        ("nbar", (1.0, 1.0, 1.0, 1.0), "B"),  # a tie
        ("nbar", (0.0, 1.0, 1.0, 0.0), "B"),  # LoRA's start: A shrinks
        ("nbar", (1.0, 1.0, None, 1.0), "A"),
        ("obar", (2.0, 1.0, 1.0, 1.0), "A"),
        ("obar", (1.0, 2.0, 9.0, 1.0), "B"),
        ("obar", (1.0, 1.0, 1.0, 9.0), "A"),  # a tie
    ],
)
def test_which_factor_grows(kind, numbers_, grows) -> None:
    block = pair(*numbers_)
    Balance(kind=kind, strength=2.0).move({"0": block}, learning_rate=0.05)
    for role in ("A", "B"):
        start = numbers_[0] if role == "B" else numbers_[1]
        torch.testing.assert_close(block[role].detach(), torch.full_like(block[role], start * (1.1 if role == grows else 0.9)))


def test_the_product_changes_by_the_square_of_e_and_sites_are_independent() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + bar(strength=1.0)")
    open_gates(handle)
    handle.optimizer(lr=1e-3)
    before = {site: handle.update_of(site).dense().detach() for site in handle.targets}
    problem.loss(problem.batches[0]).backward()
    handle.after_backward()
    for site, update in before.items():
        ratio = (handle.update_of(site).dense().detach() - update).norm() / update.norm()
        assert abs(float(ratio) - 1e-6) < 1e-12
    alone = {"0": pair(1.0, 2.0, 3.0, 1.0)}
    both = {"0": pair(1.0, 2.0, 3.0, 1.0), "1": pair(9.0, 2.0, 0.0, 7.0), "bank": {"b": nn.Parameter(torch.ones(2))}}
    for blocks in (alone, both):
        Balance().move(blocks, learning_rate=0.1)
    assert torch.equal(alone["0"]["B"], both["0"]["B"])
    assert torch.equal(both["bank"]["b"], torch.ones(2))


def test_obar_shrinks_the_imbalance_until_it_is_within_one_step() -> None:
    block, bar, e = pair(3.0, 0.5, 0.0, 0.0), Balance(kind="obar", strength=1.0), 0.01

    def balance():
        return 0.5 * float(block["B"].detach().square().sum() - block["A"].detach().square().sum())

    def size():
        return float(block["B"].detach().square().sum() + block["A"].detach().square().sum())

    previous = balance()
    expected = previous - e * size() + e * e * previous
    bar.move({"0": block}, learning_rate=e)
    assert abs(balance() - expected) < 1e-12
    flipped = False
    for _ in range(400):
        previous = abs(balance())
        bar.move({"0": block}, learning_rate=e)
        flipped = flipped or abs(balance()) >= previous
        assert flipped or abs(balance()) < previous
    assert abs(balance()) <= 2 * e * size()


def test_strength_zero_is_the_plain_optimizer_to_the_bit_and_the_move_stays() -> None:
    results = []
    for text in ("lora(rank=2)", "lora(rank=2) + bar(strength=0.0)", "lora(rank=2) + bar(strength=2.0)"):
        problem = Regression()
        handle = problem.adapt(text)
        problem.train(handle, handle.optimizer(lr=0.02), 5)
        results.append(numbers(handle))
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0]["0.A"], results[2]["0.A"])


@pytest.mark.parametrize(("decay", "halfway"), [("linear", 0.5), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)))])
def test_decay(decay: str, halfway: float) -> None:
    bar = Balance(strength=3.0, decay_steps=10, decay=decay)
    strengths = []
    for _ in range(12):
        strengths.append(bar.current_strength)
        bar.advance()
    assert strengths[0] == 3.0
    assert strengths[5] == pytest.approx(3.0 * halfway)
    assert strengths[10] == strengths[11] == pytest.approx(0.0, abs=1e-15)
    assert strengths == sorted(strengths, reverse=True)
    again = Balance(strength=3.0, decay_steps=10, decay=decay)
    again.load_state_dict({"steps": 5})
    assert again.current_strength == strengths[5]


def test_balance_in_training_gets_better() -> None:
    spread = []
    for text in ("lora(rank=2)", "lora(rank=2) + bar(kind='obar', strength=2.0)"):
        problem = Regression()
        handle = problem.adapt(text)
        open_gates(handle)
        with torch.no_grad():
            for block in handle.blocks().values():
                block["B"].mul_(4.0)
        problem.train(handle, handle.optimizer(lr=0.01), 30)
        norms = [(block["B"].detach().norm(), block["A"].detach().norm()) for block in handle.blocks().values()]
        spread.append(sum(abs(float(b - a)) for b, a in norms))
    assert spread[1] < 0.5 * spread[0]


def test_bad_arguments_and_a_step_that_would_flip_signs() -> None:
    with pytest.raises(ArgumentError, match="nbar, obar, not 'sbar'"):
        Balance(kind="sbar")
    with pytest.raises(ArgumentError, match="strength >= 0"):
        Balance(strength=-1.0)
    with pytest.raises(TrainingError, match="would flip signs"):
        Balance(strength=2.0).move({"0": pair(1, 1, 1, 1)}, learning_rate=0.6)
    with pytest.raises(RecipeError, match=r"roles A, B; Full trains weight"):
        Regression().adapt("full + bar")
    with pytest.raises(RecipeError, match=r"LoRA trains B"):
        Regression().adapt("lora_fa(rank=2) + bar")
