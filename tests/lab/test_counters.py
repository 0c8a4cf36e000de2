"""Costs are counted: the counters equal the formulas for LoRA's fused layer, and the frozen base's for none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise.core.errors import TrainingError
from rankwise.lab.counters import Cost, SavedBytes, flops_of, frozen_cost, training_cost

T, N, H, M, R = 7, 10, 14, 6, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, H), nn.ReLU(), nn.Linear(H, M)).double()


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


BATCH = torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_frozen_base_is_forward_plus_input_gradients_behind_the_first_layer() -> None:
    model = network()
    cost = frozen_cost(model, ["0", "2"], BATCH, loss=loss)
    assert cost.flops == 2 * T * (N * H + H * M) + 2 * T * H * M
    assert cost.saved_bytes == 8 * T * (H + M)  # relu's output, and the network's output for the square
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lora_adds_what_the_formula_says() -> None:
    base = frozen_cost(network(), ["0", "2"], BATCH, loss=loss)
    handle = rankwise.adapt_(network(), rankwise.catalog.lora(rank=R), where=["0", "2"])
    cost = training_cost(handle, BATCH, loss=loss)
    forward = 2 * R * T * (N + H) + 2 * R * T * (H + M)
    first = 2 * R * T * (2 * H + N)  # Bᵀg, dB, dA: the input needs no gradient
    second = 2 * R * T * (2 * M + 2 * H)  # and x's gradient through A
    assert cost.flops - base.flops == forward + first + second
    assert cost.trained == R * (N + H) + R * (H + M)
    assert cost.state == 2 * cost.trained
    assert cost.head == 0
    # more than the base keeps: the first layer's input and the two z = A x of r numbers per token
    assert cost.saved_bytes - base.saved_bytes == 8 * T * (N + 2 * R)
    assert cost.relative_to(base)["flops"] == cost.flops / base.flops


def test_in_place_products_are_counted() -> None:
    y, left, right = torch.zeros(4, 5), torch.ones(4, 3), torch.ones(3, 5)
    assert flops_of(lambda: y.addmm_(left, right)) == 2 * 4 * 3 * 5
    assert flops_of(lambda: left @ right[:, 0]) == 2 * 4 * 3
    stack = torch.ones(2, 4, 3)
    assert flops_of(lambda: torch.zeros(2, 4, 5).baddbmm_(stack, torch.ones(2, 3, 5))) == 2 * 2 * 4 * 3 * 5


def test_attention_on_a_cpu_is_counted() -> None:
    query = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def both() -> None:
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

    forward = 2 * 2 * (5 * 5 * 4) * 2
    assert flops_of(lambda: nn.functional.scaled_dot_product_attention(query, query, query)) == forward
    assert flops_of(both) > 2 * forward


def test_a_second_pass_counts_twice() -> None:
    recipe = rankwise.catalog.lora(rank=R)
    plain = training_cost(rankwise.adapt_(network(), recipe), BATCH, loss=loss)
    from rankwise.core.protocols import Perturbation

    class Again(Perturbation):
        second_pass = True

        def move(self, blocks, *, learning_rate):
            pass

    handle = rankwise.adapt_(network(), recipe)
    handle.perturbation = Again()
    assert training_cost(handle, BATCH, loss=loss).flops == 2 * plain.flops


def test_without_backward_two_forwards_and_nothing_kept() -> None:
    plain = rankwise.adapt_(network(), rankwise.catalog.lora(rank=R), where=["0", "2"])
    forward = flops_of(lambda: loss(plain.model, BATCH))
    for text, forwards in (("zeroth_order", 2), ("zeroth_order(directions=3, difference='forward')", 4), ("zo_rank", 8)):
        handle = rankwise.adapt_(network(), rankwise.compose(f"lora(rank={R})", text), where=["0", "2"])
        cost = training_cost(handle, BATCH, loss=loss)
        assert (cost.flops, cost.saved_bytes, cost.state) == (forwards * forward, 0, 0)


def test_guided_noise_is_one_pass_with_one_more_product_per_layer_and_direction() -> None:
    plain, noisy = (
        training_cost(rankwise.adapt_(network(), rankwise.compose(text), where=["0", "2"]), BATCH, loss=loss)
        for text in (f"lora(rank={R})", f"lora(rank={R}) + lora_ggpo")
    )
    products = 2 * T * (N * H + H * M) + 2 * T * H * M  # x Eᵀ, and Eᵀ dy where the input needs a gradient: as the frozen base
    grams = sum(2 * R * R * (n + m) + 2 * (2 * R) ** 2 * (n + m) for m, n in ((H, N), (M, H)))
    assert noisy.flops - plain.flops == products + grams
    assert noisy.saved_bytes == plain.saved_bytes


def test_shared_storage_and_weights_count_once_or_not_at_all() -> None:
    weight = torch.ones(5, 5, requires_grad=True)
    x = torch.ones(4, 5)
    with SavedBytes([weight]) as saved:
        y = (x @ weight).sum() + (x.view(2, 2, 5) @ weight).sum()
    assert saved.total == 4 * 5 * 4
    y.backward()


def test_sgd_keeps_no_state_and_the_head_is_apart() -> None:
    handle = rankwise.adapt_(network(), rankwise.compose("lora(rank=2) + sgd"), where=["0"], train_also=["2"])
    cost = training_cost(handle, BATCH, loss=loss)
    assert cost.state == 0
    assert cost.head == H * M + M
    assert cost.trained == 2 * (N + H)
    handle = rankwise.adapt_(network(), rankwise.compose("lora(rank=2)"), where=["0"], train_also=["2"])
    assert training_cost(handle, BATCH, loss=loss).state == 2 * cost.trained


def test_a_loss_that_does_not_reach_the_adapter_is_an_error() -> None:
    handle = rankwise.adapt_(network(), rankwise.catalog.lora(rank=2), where=["0"], train_also=["2"])

    def elsewhere(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model[2](torch.ones(1, H, dtype=torch.float64)).sum()

    with pytest.raises(TrainingError, match="no trained tensor got a gradient"):
        training_cost(handle, BATCH, loss=elsewhere)


def test_costs_survive_json() -> None:
    cost = Cost(5, 4, 3, 2, 1)
    assert Cost(**cost.to_json()) == cost
