"""lora_dropout: what is masked, that masks repeat where a forward is repeated, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.lab.counters import SavedBytes
from rankwise.parameterizations.lora_dropout import KINDS


class Siblings(nn.Module):
    """Three layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 6) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def made(model: nn.Module, text: str, where: Any = "all-linear") -> rankwise.Handle:
    generator = torch.Generator().manual_seed(0)

    def fill(tensors: Any) -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    fill(model.double().parameters())
    handle = rankwise.adapt_(model, rankwise.compose(text), where=where)
    fill(tensor for block in handle.blocks().values() for tensor in block.values())
    return handle


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def changes(model: nn.Module, x: Tensor) -> list[Tensor]:
    outputs = model(x)
    with rankwise.switched_off(model):
        return [y - plain for y, plain in zip(outputs, model(x), strict=True)]


def test_siblings_read_one_thinned_input() -> None:
    model, x = Siblings(), numbers(7, 8)
    handle = made(model, "lora_dropout(rank=6, probability=0.5)")
    full = [block["B"] @ block["A"] for block in handle.blocks().values()]  # (6, 8)
    stacked = torch.cat(full)  # (18, 8): of full column rank, so that x̃ can be read off the three changes together
    thinned = torch.linalg.lstsq(stacked, torch.cat(changes(model, x), dim=1).t()).solution.t()  # (7, 8)
    torch.testing.assert_close(thinned, torch.where(thinned.abs() < 1e-9, 0.0, 2 * x), rtol=1e-8, atol=1e-8)
    assert 0.2 < float((thinned.abs() < 1e-9).double().mean()) < 0.8


def test_shared_masks_keep_nothing_beyond_the_shared_input() -> None:
    def saved(probability: float) -> int:
        model, x = Siblings(), numbers(64, 8).requires_grad_()
        made(model, f"lora_dropout(rank=2, probability={probability})")
        with SavedBytes(model.parameters()) as counted:
            sum(y.sum() for y in model(x)).backward()
        return counted.total

    assert saved(0.5) <= saved(0.0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_repeats_the_masks(kind: str, reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        handle = made(model, f"lora_dropout(rank=3, kind='{kind}', probability=0.5)")
        x = numbers(6, 8).requires_grad_()
        for _ in range(2):  # the second forward has other masks
            y = (
                checkpoint(lambda z: checkpoint(model, z, use_reentrant=reentrant), x, use_reentrant=reentrant)
                if checkpointed
                else model(x)
            )
            y.square().sum().backward()
        return [x.grad, *(tensor.grad for block in handle.blocks().values() for tensor in block.values())]

    for plain, repeated in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-12, atol=1e-12)


def test_a_thinned_input_has_right_first_and_second_derivatives() -> None:
    from rankwise.core.randomness import MaskStream

    stream, x = MaskStream(0), numbers(3, 4).requires_grad_()
    stream.start_forward()

    def thin(value: Tensor) -> Tensor:
        return stream.thin(value * 1.0, 0.5, "layer").pow(3)  # a new tensor, so that nothing is taken from an earlier call

    assert torch.autograd.gradcheck(thin, [x])
    assert torch.autograd.gradgradcheck(thin, [x])


def test_a_dropped_row_is_the_base_to_the_bit_and_a_kept_one_is_doubled() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16)), numbers(5, 8)
    handle = made(model, "lora_dropout(rank=2, kind='row', probability=0.5)")
    with rankwise.switched_off(model):
        plain = model(x)
    difference = model(x) - plain
    dropped = (difference == 0).all(0)
    assert 0 < int(dropped.sum()) < 16
    full = 2 * x @ handle.update_of("0").dense().t()
    torch.testing.assert_close(difference[:, ~dropped], full[:, ~dropped])


def test_rank_dropout_of_rank_one_is_module_dropout() -> None:
    outputs = []
    for kind in ("rank", "module"):
        model = nn.Sequential(nn.Linear(8, 4))
        made(model, f"lora_dropout(rank=1, kind='{kind}', probability=0.5)")
        outputs.append(torch.stack([model(numbers(3, 8)) for _ in range(12)]))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert outputs[0].std(0).min() > 0


LAYERS = {
    "linear": (lambda: nn.Linear(8, 4), numbers(1, 1, 8).expand(40, 5, 8)),
    "conv": (lambda: nn.Conv2d(8, 4, 1, groups=2), numbers(1, 8, 1, 1).expand(40, 8, 3, 3)),
    "embedding": (lambda: nn.Embedding(8, 4), torch.full((40, 5), 3)),
}


@pytest.mark.parametrize("kind", ["rank", "row", "module"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_a_mask_is_drawn_for_every_sample_or_for_every_token(layer: str, kind: str, granularity: str) -> None:
    make, x = LAYERS[layer]
    model = nn.Sequential(make())
    made(model, f"lora_dropout(rank=2, kind='{kind}', probability=0.5, granularity='{granularity}')", where=["0"])
    with rankwise.switched_off(model):
        plain = model(x)
    change = (model(x) - plain).detach()
    tokens = change.flatten(2).transpose(1, 2) if layer == "conv" else change  # (40, tokens, 4), all of one input
    assert len(torch.unique(tokens[:, 0].round(decimals=9), dim=0)) > 1, "rows of the batch differ"
    alike = torch.allclose(tokens, tokens[:, :1].expand_as(tokens), rtol=1e-12, atol=1e-12)
    assert alike is (granularity == "sample"), "tokens of a row are alike, or not"


def test_the_global_generator_does_not_move_and_eval_is_lora() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), numbers(3, 8)
    handle = made(model, "lora_dropout(rank=2, kind='module', probability=0.9)")
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)
    layer = model[0]
    torch.testing.assert_close(model.eval()(x), x @ (layer.weight + handle.update_of("0").dense()).t() + layer.bias)


@pytest.mark.parametrize(
    "text", ["lora_dropout(kind='columns')", "lora_dropout(probability=1.5)", "lora_dropout(granularity='batch')"]
)
def test_bad_arguments_are_refused(text: str) -> None:
    with pytest.raises(ArgumentError):
        rankwise.adapt_(nn.Sequential(nn.Linear(16, 16)), rankwise.compose(text))
