"""FLoRA's core: mode products, the chain of small convolutions, and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rankwise
from rankwise.core.errors import RecipeError
from rankwise.core.structured import Tucker
from tests.contract.subjects import scatter

CONVOLUTIONS = {
    "2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 9, 8)),
    "2d grouped": (lambda: nn.Conv2d(12, 8, 3, padding=1, groups=2), (2, 12, 5, 4)),
    "2d circular": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 5, 4)),
    "1d": (lambda: nn.Conv1d(6, 8, 3, padding="same"), (2, 6, 9)),
    "3d": (lambda: nn.Conv3d(6, 8, (3, 1, 2), stride=(2, 1, 1)), (2, 6, 5, 3, 4)),
}


def adapted(make, text: str = "flora_core(rank=4)") -> tuple[nn.Sequential, rankwise.Handle]:
    model = nn.Sequential(make()).double()
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    scatter(handle)
    return model, handle


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_chain_is_the_dense_convolution_of_the_mode_products(name: str) -> None:
    make, size = CONVOLUTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, handle = adapted(make)
    block, layer = handle.blocks()["0"], model[0]
    letters = "abc"[: layer.weight.dim() - 2]
    modes = ["P_out", "P_in", *(f"P_kernel{k}" for k in range(len(letters)))]
    assert set(block) == {"core", *modes}
    source = "oi" + letters
    text = ",".join([source, *(f"{letter.upper()}{letter}" for letter in source)]) + "->" + source.upper()
    delta = torch.einsum(text, block["core"], *(block[mode] for mode in modes))
    assert delta.shape == layer.weight.shape
    torch.testing.assert_close(handle.update_of("0").dense(), delta.flatten(1), rtol=1e-12, atol=1e-12)
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = make().double()
    plain.weight.data, plain.bias.data = (layer.weight + delta).detach(), layer.bias.detach()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_the_kernel_meets_few_channels_only() -> None:
    _, handle = adapted(lambda: nn.Conv2d(32, 32, 5, padding=2), "flora_core(rank=4)")
    update = handle.parameterization("0").update()
    assert isinstance(update, Tucker)
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        update.apply(x, handle.targets["0"].layout)
    narrow = 2 * 36 * (32 * 4 + 4 * 4 * 25 + 4 * 32)  # three small convolutions
    expanding = 2 * 4 * 4 * 2 * (2 * 5 + 5 * 5)  # mode products of the kernel, at most
    assert narrow <= counter.get_total_flops() <= narrow + expanding
    assert narrow < 2 * 36 * (4 * 32 * 25) / 3, "a third of what LoRA's wide kernel would take"


def test_sizes_and_counts() -> None:
    """out = in = 128, kernel 7 × 7, core (16, 16, 2, 2): 1024 + 2048 + 2048 + 14 + 14 numbers."""
    _, handle = adapted(lambda: nn.Conv2d(128, 128, 7), "flora_core(rank=16)")
    assert handle.trained_numbers == 5148
    _, handle = adapted(lambda: nn.Conv2d(3, 8, 1), "flora_core(rank=3)")
    assert handle.blocks()["0"]["core"].shape == (3, 3, 1, 1), "no mode of the core is wider than the weight's"
    _, handle = adapted(lambda: nn.Conv2d(8, 8, 3, groups=8), "flora_core(rank=4)")
    assert handle.blocks()["0"]["core"].shape == (4, 1, 2, 2)


def test_factors_are_drawn_by_the_width_of_the_core() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    handle = rankwise.adapt_(model, rankwise.compose("flora_core(rank=16)"), where=["0"])
    block = handle.blocks()["0"]
    assert not block["core"].any()
    for mode in ("P_out", "P_in"):
        assert abs(block[mode].std().item() - 32**-0.5) < 0.1 * 32**-0.5
    assert not torch.equal(block["P_out"], block["P_in"])


def test_the_scale_is_a_plain_constant() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, one = adapted(lambda: nn.Conv2d(6, 8, 3))
        _, four = adapted(lambda: nn.Conv2d(6, 8, 3), "flora_core(rank=4, scale=4.0)")
    torch.testing.assert_close(four.update_of("0").dense(), 4 * one.update_of("0").dense())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="kernel_rank of at least 1; it is 0"):
        adapted(lambda: nn.Conv2d(6, 8, 3), "flora_core(rank=2, kernel_rank=0)")
    with pytest.raises(RecipeError, match="rank is 9 for a layer of 8 × 54"):
        adapted(lambda: nn.Conv2d(6, 8, 3), "flora_core(rank=9)")
