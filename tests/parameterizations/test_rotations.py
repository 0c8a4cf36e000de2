"""OFT, BOFT, HRA, IA3, RoAd and DeLoRA: options, refusals, limits, and what half precision keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.core.queries import as_low_rank
from rankwise.parameterizations import boft
from tests.contract.checks import ON_EVERY_LAYER, check_starts_at_base, name_of
from tests.contract.subjects import LAYERS, LINEAR, LayerKind, Subject, inputs_of, model_of, scatter


def adapted(text: str, kind: LayerKind = LINEAR, *, generic: bool = True) -> tuple[nn.Module, rankwise.Handle, Any]:
    model = model_of(kind)
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["layer"])
    if generic:
        scatter(handle)
    return model, handle, handle.parameterization("layer")


def layer_of(name: str) -> LayerKind:
    return next(kind for kind in LAYERS if kind.name == name)


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("oft(block=3)", "Linear", "divides the 8 rotated coordinates; block is 3"),
        ("oft(block=0)", "Linear", "block is 0"),
        ("oft(block=3)", "Embedding", "divides the 8 rotated"),
        ("oft(block=8, side='output')", "Linear", "divides the 12 rotated"),
        ("boft(block=3, factors=2)", "Linear", "even block"),
        ("boft(block=4, factors=3)", "Linear", "multiple of block"),
        ("boft(factors=0)", "Linear", "factors >= 1"),
        ("road(group=3)", "Linear", "even group"),
        ("road(group=8)", "Linear", "divides the 12 outputs"),
        ("road(group=4)", "Conv2d grouped", "divides the 6 outputs"),
        ("hra(rank=16)", "Linear", "rank"),
        ("capaboost(rank=1, masks='nm')", "Conv1d", ""),
    ],
)
def test_what_a_layer_cannot_take_is_refused_with_what_it_can(text: str, kind: str, reason: str) -> None:
    model = model_of(layer_of(kind))
    if not reason:
        assert not rankwise.problems(model, rankwise.compose(text), where=["layer"])
        return
    with pytest.raises(RecipeError, match=reason) as caught:
        rankwise.adapt_(model, rankwise.compose(text), where=["layer"])
    remedy = caught.value.problems[0].remedy
    assert "use " in remedy
    named = remedy.partition("use ")[2].split(",")[0].split(" ")[0]
    if "=" in named and "rank" not in named:  # the value it names does fit
        slug, _, arguments = text.partition("(")
        name = named.partition("=")[0]
        others = [part for part in arguments.rstrip(")").split(", ") if not part.startswith(f"{name}=")]
        mended = rankwise.compose(f"{slug}({', '.join([named, *others])})")
        assert not rankwise.problems(model_of(layer_of(kind)), mended, where=["layer"])


@pytest.mark.parametrize(
    "text",
    [
        "oft(block=4, cayley='series')",
        "oft(block=4, side='left')",
        "oft(block=4, dropout=1.0)",
        "oft(block=4, constrain=-1.0)",
        "oft(block=4, cayley='neumann', terms=0)",
        "boft(dropout=-0.1)",
        "hra(start='zero')",
        "ia3(side='both')",
        "ia3(input_layers=('layr',))",
        "road(variant=3)",
        "delora(start='random')",
        "delora(dropout=1.0)",
    ],
)
def test_unknown_options_are_refused(text: str) -> None:
    model = model_of(LINEAR)
    with pytest.raises(ArgumentError):
        rankwise.adapt_(model, rankwise.compose(text), where=["layer"])
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing was frozen"


def test_an_embeddings_vectors_are_rotated() -> None:
    model, _, entry = adapted("oft(block=4)", layer_of("Embedding"))
    tokens = inputs_of(layer_of("Embedding"))
    plain = model_of(layer_of("Embedding"))(tokens)
    torch.testing.assert_close(model(tokens), plain @ entry.rotation().dense())


def test_blocks_of_one_have_nothing_to_train_and_one_block_rotates_everything() -> None:
    model, handle, _ = adapted("oft(block=1)")
    assert handle.trained_numbers == 0
    torch.testing.assert_close(model(inputs_of(LINEAR)), model_of(LINEAR)(inputs_of(LINEAR)))
    _, handle, entry = adapted("oft(block=8)")
    assert handle.trained_numbers == 28
    R = entry.rotation().dense()
    torch.testing.assert_close(R @ R.t(), torch.eye(8, dtype=R.dtype))


def test_constrained_blocks_keep_their_bound_and_their_gradient() -> None:
    _, handle, entry = adapted("oft(block=4, constrain=0.3)")
    R = entry.blocks()
    identity = torch.eye(4, dtype=R.dtype)
    Q = torch.linalg.solve(R + identity, identity - R)
    torch.testing.assert_close(Q.flatten(1).norm(dim=1), torch.full((2,), 0.3 / 2**0.5, dtype=R.dtype))
    model, handle, _ = adapted("oft(block=4, constrain=0.3)", generic=False)
    model(inputs_of(LINEAR)).sum().backward()
    grad = handle.blocks()["layer"]["skew"].grad
    assert grad is not None and torch.isfinite(grad).all() and grad.any(), "no NaN where the norm is zero"


@pytest.mark.parametrize("levels", [2, 3])
def test_levels_multiplied_out_are_the_levels(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = layer_of("Linear") if levels == 3 else layer_of("Linear without bias")
    text = f"boft(block=2, factors={levels})"
    model, handle, entry = adapted(text, kind)
    x = inputs_of(kind)
    expected, rotation = model(x), entry.rotation()
    assert type(rotation).__name__ == "BlockDiagonal"
    expected.square().sum().backward()
    grads = [tensor.grad.clone() for tensor in handle.blocks()["layer"].values() if tensor.grad is not None]
    monkeypatch.setattr(boft, "WIDEST", 0)
    assert type(entry.rotation()).__name__ == "Butterfly"
    torch.testing.assert_close(entry.rotation().dense(), rotation.dense())
    torch.testing.assert_close(entry.rotation().transposed().dense(), rotation.dense().t())
    model.zero_grad()
    again = model(x)
    torch.testing.assert_close(again, expected)
    again.square().sum().backward()
    for one, tensor in zip(grads, handle.blocks()["layer"].values(), strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, one)


@pytest.mark.parametrize("check", [check for check in ON_EVERY_LAYER if check is not check_starts_at_base], ids=name_of)
@pytest.mark.parametrize("kind", [LINEAR, layer_of("Conv2d")], ids=lambda kind: kind.name)
@pytest.mark.parametrize("text", ["hra(rank=4, gram_schmidt=True, start='random')", "hra(rank=3, start='random')"])
def test_reflections_that_start_elsewhere_keep_every_other_promise(text: str, kind: LayerKind, check: Any) -> None:
    check(Subject(text, rankwise.compose(text)), kind)


def test_reflections_export_as_lora_of_their_rank() -> None:
    _, handle, entry = adapted("hra(rank=4)")
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank == 4
    W = model_of(LINEAR).layer.weight
    torch.testing.assert_close(W + pair.dense(), W @ entry.rotation().dense())
    with torch.no_grad():  # merged, the factors are still those of the untouched weight
        handle.merge_()
        again = handle.low_rank_of("layer")
    assert again is not None
    torch.testing.assert_close(again.dense(), pair.dense())
    assert as_low_rank(adapted("oft(block=4)")[1].update_of("layer")) is None


def test_a_reflection_at_nothing_reflects_nothing() -> None:
    model, handle, entry = adapted("hra(rank=2, start='random')")
    with torch.no_grad():
        handle.blocks()["layer"]["U"][:, 0] = 0.0
    u = handle.blocks()["layer"]["U"][:, 1].detach()
    single = torch.eye(8, dtype=u.dtype) - 2 * torch.outer(u, u) / (u @ u)
    torch.testing.assert_close(entry.rotation().dense().detach(), single)
    model(inputs_of(LINEAR)).sum().backward()
    grad = handle.blocks()["layer"]["U"].grad
    assert grad is not None and torch.isfinite(grad).all()


def test_named_layers_take_the_input_side() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.key(x))

    model = nn.ModuleList([Block(), Block()]).double()
    handle = rankwise.adapt_(model, rankwise.compose("ia3(input_layers=('down',))"))
    sizes = {site: tuple(block["gain"].shape) for site, block in handle.blocks().items()}
    assert sizes == {"0.key": (12,), "0.down": (12,), "1.key": (12,), "1.down": (12,)}
    sides = {site: handle.parameterization(site).side for site in sizes}
    assert sides == {"0.key": "output", "0.down": "input", "1.key": "output", "1.down": "input"}
    handle.detach_()
    handle = rankwise.adapt_(model, rankwise.compose("ia3(input_layers=('1.down',))"))
    assert handle.parameterization("0.down").side == "output" and handle.parameterization("1.down").side == "input"


def test_a_grouped_convolution_scales_each_channel_of_each_group() -> None:
    kind = layer_of("Conv2d grouped")
    model, handle, _ = adapted("ia3(side='input')", kind)
    gain = handle.blocks()["layer"]["gain"]
    assert gain.shape == (8,), "one per channel, groups and all"
    x = inputs_of(kind)
    torch.testing.assert_close(model(x), model_of(kind)(x * gain.view(-1, 1, 1)))


def test_delora_is_bounded_and_doubles_with_its_strength() -> None:
    for text, bound in (("delora(rank=4, strength=3)", 2.0), ("delora(rank=4, strength=3, start='zero')", 1.0)):
        _, handle, entry = adapted(text)
        with torch.no_grad():
            entry.A.mul_(1e3)
            entry.B.mul_(1e3)
        update, norms = handle.update_of("layer").dense(), entry.column_norms
        strength = entry.strength.item()
        assert (update / norms).norm() <= bound * abs(strength) + 1e-9
        with torch.no_grad():
            entry.strength.mul_(2)
        torch.testing.assert_close(handle.update_of("layer").dense(), 2 * update)


def test_delora_keeps_its_norms_and_its_start_in_the_file(tmp_path: Path) -> None:
    model, handle, entry = adapted("delora(rank=2)")
    keys = set(entry.state_dict())
    assert {"column_norms", "start_A", "start_B"} <= keys
    assert entry.start_A.data_ptr() != entry.A.data_ptr()
    handle.save(tmp_path)
    fresh = model_of(LINEAR)
    loaded = rankwise.load_(fresh, tmp_path)
    torch.testing.assert_close(loaded.parameterization("layer").start_B, entry.start_B, rtol=0, atol=0)
    assert torch.equal(fresh(inputs_of(LINEAR)), model(inputs_of(LINEAR)))


@pytest.mark.parametrize("text", ["oft(block=4)", "boft(block=2, factors=2)", "hra(rank=4)"])
def test_rotations_are_made_in_float32_also_under_autocast_and_as_half_tensors(text: str) -> None:
    model, _, entry = adapted(text)
    expected = entry.rotation().dense()
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        entry.rotation()
        moved = entry.blocks() if text.startswith("oft") else None
        assert model(inputs_of(LINEAR).float()).dtype is torch.bfloat16
    if moved is not None:
        torch.testing.assert_close(torch.block_diag(*moved).double(), expected, rtol=1e-5, atol=1e-5)
    model.bfloat16()
    rotation = entry.rotation().dense().double()
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(8, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert model(inputs_of(LINEAR).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("text", ["oft(block=4)", "boft(block=2, factors=2)", "hra(rank=2)", "ia3", "ia3(side='input')"])
def test_no_matrix_of_the_weights_size_is_made_in_forward(text: str) -> None:
    """On linear layers the input is moved, not the weight, and no dense rotation is built."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = nn.Sequential(nn.Linear(64, 48)).double()
    rankwise.adapt_(model, rankwise.compose(text))
    weight = model[0].weight

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.data_ptr() != weight.data_ptr():
                self.largest = max(self.largest, result.numel())
            return result

    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Sizes() as sizes:
        model(x)
    assert sizes.largest < 48 * 64 / 4
