"""Private streams depend on the seed and on every name."""

from __future__ import annotations

import pytest
import torch

from rankwise.core.randomness import generator_for
from tests.core.training import Regression, numbers


def test_streams_differ_by_seed_and_by_name_and_repeat() -> None:
    keys = [(seed, site, purpose) for seed in (0, 1, 2, 2**31, -1) for site in ("a", "b") for purpose in ("start", "mask")]
    draws = [torch.rand(4, generator=generator_for(*key)) for key in keys]
    for index, draw in enumerate(draws):
        assert torch.equal(draw, torch.rand(4, generator=generator_for(*keys[index])))
        assert not any(torch.equal(draw, other) for other in draws[:index]), keys[index]


@pytest.mark.parametrize("text", ["lora(rank=2)", "gated_lora(rank=2, form='sora')", "vera(rank=4)"])
def test_another_seed_is_another_start(text: str) -> None:
    starts = []
    for seed in (0, 1):
        handle = Regression().adapt(text, seed=seed)
        starts.append(dict(numbers(handle)) | (dict(handle.bank.named_buffers()) if handle.bank is not None else {}))
    assert any(not torch.equal(value, starts[1][name]) for name, value in starts[0].items())
