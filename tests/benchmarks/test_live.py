"""The counter of live bytes against sums done by hand, and the section it is for on a tiny model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import memory, memory_page
from benchmarks.live import LiveBytes


def test_what_is_made_counts_until_it_is_given_back() -> None:
    with LiveBytes() as bytes_:
        one = torch.zeros(1000)
        view = one[10:].view(99, 10)
        assert bytes_.live == 4000
        del one
        assert bytes_.live == 4000  # the view keeps the memory
        del view
        assert bytes_.live == 0
        for _ in range(5):
            two = torch.zeros(1000) + 1  # what is overwritten dies only after the next is there
        assert (bytes_.live, bytes_.peak) == (4000, 12_000)
    assert two.shape == (1000,)


def test_in_place_operations_and_what_was_there_count_once() -> None:
    there = torch.zeros(1000)
    with LiveBytes([there, there[5:]]) as bytes_:
        there.add_(1).mul_(2)
        assert (bytes_.live, bytes_.peak) == (4000, 4000)


def test_a_training_step_by_hand() -> None:
    layer, x = nn.Linear(100, 100, bias=False), torch.randn(10, 100, generator=torch.Generator().manual_seed(0))
    weight = 4 * 100 * 100
    with LiveBytes([layer.weight, x]) as bytes_:
        base = bytes_.live
        assert base == weight + 4000
        loss = layer(x).relu().square().sum()
        assert bytes_.live - base == 4000 + 4  # relu's output, kept for backward, and the loss
        loss.backward()
        assert bytes_.live - base == weight + 4  # the gradient, and the loss
        del loss
        optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
        optimizer.step()
        assert bytes_.live - base == 3 * weight + 4  # gradient, two moments, the counter
        optimizer.zero_grad()
        assert bytes_.live - base == 2 * weight + 4


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=3, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, vocab_size=32,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("variant", memory.variants(4), ids=lambda variant: variant.name)
def test_every_projection_of_the_catalog_has_its_row(
    tiny: nn.Module, variant: memory.Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "TOKENS", 2)  # so that weights count, not activations
    reference = memory.Training(tiny, memory.variants(4)[0].make())
    reference.step()
    row = memory.counted(tiny, variant)
    memory.time_(row, tiny, variant, reference, 1)
    numbers = 3 * (4 * 16**2 + 3 * 16 * 24)
    if not variant.slug:
        counters = 4 * 3 * 7  # a step count per layer
        assert row.state[0] == 2 * 4 * numbers + counters
        assert row.amortized == 1.0
    assert row.frozen == 4 * numbers
    assert row.peak > 2 * row.frozen + row.state[1]
    assert row.peak_per_layer is None or row.peak_per_layer < row.peak
    for table in (memory_page.state_table([row]), memory_page.step_table([row])):
        assert {len(line) for line in table[1]} == {len(table[0])}


def test_the_formula_on_a_llama_of_1b_gives_the_published_saving() -> None:
    assert memory_page.on_llama("galore") == pytest.approx(0.611, abs=5e-4)  # as Fira's paper has it for rank 512


def test_refresh_steps_are_found_by_the_arguments() -> None:
    galore = next(one for one in memory.variants(4) if one.slug == "galore")
    assert memory.refreshes(galore) == [({"refresh": 2}, 200.0)]
