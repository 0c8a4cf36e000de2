"""What could go wrong without a word in methods that read a frame off the weight. Tests are named by the number of the list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.checkpoint import trained_tensors
from rankwise.core.errors import CheckpointError, FingerprintError
from rankwise.core.statistics import Statistic
from tests.never_silent.models import adapted, inputs, mlp

FRAMED = [
    "svfit",
    "svfit(rank=3)",
    "loldu",
    "loldu(rank=3, start='normal')",
    "pmss(rank=3)",
    "pmss(rank=3, select='leverage', rescale=True)",
    "nested_nora(rank=2, outer_rank=4)",
    "nested_nora(rank=2, outer_rank=4, outer='awsvd')",
    "nested_nora(rank=2, outer_rank=4, compensate=True)",
    "lora_xs(rank=3)",
    "bora(rank=2)",
    "edora(rank=3)",
    "soda",
    "soda(decomposition='lq')",
]


def statistics_of(recipe: rankwise.Recipe) -> dict | None:
    """From a model that nothing was merged into."""
    if not recipe.needs:
        return None
    return rankwise.collect(mlp(), [(inputs(), torch.arange(5))], recipe.needs | {Statistic.INPUT_GRAM})


def held(net: nn.Module, recipe: rankwise.Recipe, name: str) -> dict[str, Tensor]:
    """Everything the adapter holds in the first layer: trained numbers, stored frames and those that are read again."""
    handle = rankwise.adapt_(net, recipe, name=name, statistics=statistics_of(recipe))
    entry = handle.parameterization("0")
    return {**dict(entry.named_parameters()), **dict(entry.named_buffers())}


@pytest.mark.parametrize("how", ["merged", "absorbed"])
@pytest.mark.parametrize("text", FRAMED)
def test_28_the_frame_comes_from_the_true_base(text: str, how: str) -> None:
    recipe = rankwise.compose(text)
    expected = held(mlp(), recipe, "second")
    net = mlp()
    before = net[0].weight.detach().clone()
    if how == "merged":
        adapted(net, "lora(rank=2)", name="first").merge_()
    else:
        adapted(net, "pissa(rank=2, mode='absorb')", name="first")
    assert not torch.equal(net[0].weight, before)  # otherwise there is nothing to mistake for the base
    found = held(net, recipe, "second")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} was read off a weight that holds another adapter"


@pytest.mark.parametrize(
    "text", ["pissa(rank=2) + bora(rank=2)", "pissa(rank=2) + edora(rank=2)", "pissa(rank=2) + dora(rank=2)"]
)
def test_28_lengths_after_a_start_are_those_of_the_true_base(text: str) -> None:
    recipe = rankwise.compose(text)
    expected = held(mlp(), recipe, "second")
    net = mlp()
    adapted(net, "lora(rank=2)", name="first").merge_()
    found = held(net, recipe, "second")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12, msg=f"{name} is another one")


@pytest.mark.parametrize("text", FRAMED)
def test_28_a_file_is_loaded_right_while_another_adapter_is_merged(text: str, tmp_path: Path) -> None:
    recipe, net = rankwise.compose(text), mlp()
    handle = rankwise.adapt_(net, recipe, name="second", statistics=statistics_of(recipe))
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(torch.linspace(-0.3, 0.4, tensor.numel(), dtype=tensor.dtype).view_as(tensor))
    expected = net(inputs())
    handle.save(tmp_path)
    other = mlp()
    first = adapted(other, "lora(rank=2)", name="first")
    first.merge_()
    rankwise.load_(other, tmp_path)
    first.unmerge_()
    torch.testing.assert_close(other(inputs()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", FRAMED)
def test_25_merging_moves_no_frame(text: str) -> None:
    """Frames are copies: a merge writes into W, and what the adapter holds stays."""
    net = mlp()
    recipe = rankwise.compose(text)
    handle = rankwise.adapt_(net, recipe, statistics=statistics_of(recipe))
    with torch.no_grad():
        for block in handle.blocks().values():
            for tensor in block.values():
                tensor.add_(0.1)
    before = {key: tensor.clone() for key, tensor in trained_tensors(handle).items()}
    expected = net(inputs())
    handle.merge_()
    handle.unmerge_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in trained_tensors(handle).items())
    torch.testing.assert_close(net(inputs()), expected, rtol=0, atol=0)


def test_30_a_skeleton_is_not_read_off_another_base(tmp_path: Path) -> None:
    adapted(mlp(), "pmss(rank=3)").save(tmp_path)
    with pytest.raises(FingerprintError):
        rankwise.load_(mlp(seed=1), tmp_path)


def test_31_a_skeleton_takes_no_foreign_indices() -> None:
    """C and R are not in a state dict; with other indices they would be those of other rows and columns."""
    one, other = mlp(), mlp()
    rankwise.adapt_(one, rankwise.compose("pmss(rank=3, select='random')"), seed=1)
    rankwise.adapt_(other, rankwise.compose("pmss(rank=3, select='random')"), seed=2)
    with pytest.raises(CheckpointError, match="other rows or columns"):
        other.load_state_dict(one.state_dict())
    one.load_state_dict(one.state_dict())


@pytest.mark.parametrize("text", ["svfit", "loldu", "pmss(rank=3)", "nested_nora(rank=2, outer_rank=4)", "soda"])
def test_53_a_half_precision_base_is_the_base_to_the_bit(text: str) -> None:
    net, x = mlp(dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    expected = net(x)
    handle = rankwise.adapt_(net, rankwise.compose(text))
    assert torch.equal(net(x), expected)
    assert all(tensor.dtype is torch.float32 for tensor in handle.blocks()["0"].values())


@pytest.mark.parametrize("text", ["svfit", "loldu(alpha=8)"])
def test_53_small_increments_act_on_a_half_precision_base(text: str) -> None:
    """On a long batch W + ΔW is formed where the dtype can hold it; in bfloat16 ΔW would be lost in the rounding of W."""
    net = mlp(layers=1, dtype=torch.bfloat16)
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8) * 128 + net[0].weight)
        net[0].bias.zero_()
    handle = rankwise.adapt_(net, rankwise.compose(text))
    with torch.no_grad():
        (tensor,) = handle.blocks()["0"].values()
        tensor.add_(0.05)  # the entries of W near 128 are rounded to whole numbers
    change = handle.update_of("0").dense()
    column = torch.zeros(8)
    column[0] = 1.0
    rows = column.bfloat16().expand(400, 8)
    base = handle.adapters("0").base(net[0])
    found = handle.parameterization("0")(base)
    small = found.update.apply(rows, handle.targets["0"].layout).float()[0]
    torch.testing.assert_close(small, change[:, 0], rtol=0.02, atol=1e-4)
    assert not found.whole_is_less_work(rows, handle.targets["0"].layout)
    assert float((net[0].weight.float() + change).bfloat16().float()[0, 0] - net[0].weight.float()[0, 0]) == 0.0
