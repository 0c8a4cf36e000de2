"""Tied-LoRA, LoTR, VB-LoRA and RandLoRA: groups, starts, refusals, the compact form, and the same outputs as PEFT."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError, RecipeError, TrainingError
from rankwise.parameterizations.vector_bank_compact import load_compact, save_compact
from tests.contract.subjects import scatter


class Deep(nn.Module):
    """Blocks with layers of the same names, and a head of another shape."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "other": nn.Linear(8, 8)}) for _ in range(blocks)
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["other"](block["down"](torch.tanh(block["up"](x))))  # type: ignore[index]
        return x


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapted(text: str, blocks: int = 3, *, generic: bool = True, **options) -> tuple[Deep, rankwise.Handle]:
    model = Deep(blocks).double()
    handle = rankwise.adapt_(model, rankwise.compose(text), **options)
    if generic:
        scatter(handle)
    return model, handle


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_tied_lora_starts_at_the_base_and_alive_for_every_choice_of_what_is_trained(count: int) -> None:
    expected = Deep().double()(X)
    for letters in itertools.combinations("ABuv", count):
        model, handle = adapted(f"tied_lora(rank=2, train='{''.join(letters)}')", generic=False)
        assert torch.equal(model(X), expected)
        model(X).square().sum().backward()
        found = [t.grad for block in handle.blocks().values() for t in block.values() if t.grad is not None]
        assert any(bool(g.any()) for g in found), letters
        roles = {role for block in handle.blocks().values() for role in block}
        assert roles == set(letters) == handle.recipe.roles


def test_tied_lora_groups_layers_by_the_end_of_their_name_and_their_shape() -> None:
    model, handle = adapted("tied_lora(rank=2)")
    assert [key for key in handle.blocks() if "bank" in key] == [
        f"rankwise_banks.default.group_{name}" for name in ("up_12_8", "down_8_12", "other_8_8")
    ]
    first, last = (handle.parameterization(f"blocks.{k}.up") for k in (0, 2))
    assert first.A is last.A and first.B is last.B and first.u is not last.u
    own = handle.update_of("blocks.1.up").dense().clone()
    with torch.no_grad():
        first.u.add_(1.0)
    assert torch.equal(handle.update_of("blocks.1.up").dense(), own)
    keys = [key for key in model.state_dict() if key.endswith((".A", ".B"))]
    assert len(keys) == 6 and all("rankwise_banks" in key for key in keys)


def test_the_order_of_the_layers_does_not_change_what_a_group_starts_from() -> None:
    _, one = adapted("lotr(rank=2)", generic=False, where=["blocks.0.up", "blocks.1.up"])
    _, other = adapted("lotr(rank=2)", generic=False, where=["blocks.1.up"])
    assert torch.equal(one.bank.group("shape_12_8")["left"], other.bank.group("shape_12_8")["left"])


@pytest.mark.parametrize(
    "text", ["tied_lora(rank=2, train='AA')", "tied_lora(rank=2, train='')", "tied_lora(rank=2, train='x')"]
)
def test_tied_lora_refuses_other_letters(text: str) -> None:
    with pytest.raises(ArgumentError, match="letters A, B, u, v"):
        rankwise.adapt_(Deep().double(), rankwise.compose(text))


def test_vera_with_a_pair_per_group_is_tied_lora_with_u_and_v() -> None:
    """One training run with the same buffers: equal to rounding."""
    losses = []
    for text, names in (("vera(rank=3, d_initial=1.0)", ("A", "B")), ("tied_lora(rank=3, train='uv')", ("A", "B"))):
        model, handle = adapted(text, generic=False, where=["blocks.0.up", "blocks.1.up"])
        bank = handle.bank if text.startswith("vera") else handle.bank.group("group_up_12_8")
        with torch.no_grad():
            for k, name in enumerate(names):
                bank[name].copy_(torch.randn(bank[name].shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64))
        optimizer = handle.optimizer(lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            loss = (model(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@pytest.mark.parametrize(
    "text", ["vblora(rank=2, vectors=6, length=4)", "vblora(rank=2, vectors=300, length=2, top=3, start='paper')"]
)
def test_the_compact_form_gives_the_same_outputs_and_refuses_to_train(text: str, tmp_path: Path) -> None:
    model, handle = adapted(text)
    save_compact(handle, tmp_path / "compact")
    handle.save(tmp_path / "whole")
    fresh = Deep().double()
    loaded = load_compact(fresh, tmp_path / "compact")
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-12, atol=1e-12)
    assert loaded.trained_numbers == 0
    with pytest.raises(TrainingError, match="no tensor of adapter"):
        loaded.optimizer(lr=1e-3)
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("compact", "whole")]
    assert sizes[0] < sizes[1]
    loaded.merge_()
    torch.testing.assert_close(fresh(X), model(X), rtol=1e-12, atol=1e-12)
    loaded.unmerge_()
    for parameter in fresh.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(TrainingError, match="cannot be trained on"):
        fresh(X)
    with pytest.raises(CheckpointError, match="whole adapter"):
        load_compact(Deep().double(), tmp_path / "whole")
    with pytest.raises(CheckpointError, match="no place here"):
        rankwise.load_(Deep().double(), tmp_path / "compact")
    _, other = adapted("lora(rank=2)")
    with pytest.raises(ArgumentError, match="vblora"):
        save_compact(other, tmp_path / "other")


def test_vb_lora_chooses_again_when_the_logits_move_and_refuses_a_length_that_does_not_divide() -> None:
    _, handle = adapted("vblora(rank=2, vectors=6, length=4, start='paper')", generic=False)
    entry = handle.parameterization("blocks.0.up")
    before = entry.logits_A.topk(2).indices.clone()
    with torch.no_grad():
        entry.logits_A.neg_()
    assert not torch.equal(entry.logits_A.topk(2).indices, before)
    with pytest.raises(RecipeError, match=r"(?s)length is 5 for a layer of 12 × 8.*such as length=4"):
        adapted("vblora(rank=2, vectors=6, length=5)")
    with pytest.raises(RecipeError, match="1 <= top <= vectors"):
        adapted("vblora(rank=2, vectors=2, length=4, top=3)")


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 8, 3), (8, 12, 3), (12, 8, 4), (8, 8, 3)])
def test_randlora_is_one_matrix_for_many_tokens_and_factors_for_few(m: int, n: int, rank: int) -> None:
    model = nn.Sequential(nn.Linear(n, m)).double()
    handle = rankwise.adapt_(model, rankwise.catalog.randlora(rank=rank, alpha=6.0))
    scatter(handle)
    x = torch.randn(40, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.cat([model(part) for part in x.split(4)]), rtol=1e-12, atol=1e-12)
    update = handle.update_of("0").dense()
    assert torch.linalg.matrix_rank(update) == min(m, n)


@pytest.mark.parametrize("pairing", ["paper", "peft"])
@pytest.mark.parametrize(("m", "n"), [(12, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("tokens", [1, 5, 9, 40])  # by factors, in one matrix that is made again, and in one that is kept
def test_randloras_gradient_by_hand_is_that_of_autograd(pairing: str, m: int, n: int, tokens: int) -> None:
    model = nn.Sequential(nn.Linear(n, m)).double()
    scatter(rankwise.adapt_(model, rankwise.catalog.randlora(rank=3, alpha=6.0, pairing=pairing)))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weights = rankwise.effective_weights(model)
    plain = torch.autograd.grad(rankwise.functional_call(model, weights, x).square().sum(), [x, *named.values()])
    for wanted in ([0, 1, 2], [0], [1, 2]):
        leaf = x.detach().requires_grad_(0 in wanted)
        model.requires_grad_(False)
        for parameter in named.values():
            parameter.requires_grad_(1 in wanted)
        tensors = [leaf, *named.values()]
        found = torch.autograd.grad(model(leaf).square().sum(), [tensors[index] for index in wanted])
        for value, index in zip(found, wanted, strict=True):
            torch.testing.assert_close(value, plain[index], rtol=1e-10, atol=1e-10)


def peft_model(config, base: nn.Module) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config)


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 8, 3), (8, 12, 3), (12, 8, 4), (8, 12, 8)])
def test_randlora_agrees_with_peft(m: int, n: int, rank: int) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(n, m))
    ours = nn.Sequential(nn.Linear(n, m))
    ours.load_state_dict(base.state_dict())
    config = peft.RandLoraConfig(r=rank, randlora_alpha=6, target_modules=["0"], randlora_dropout=0.0)
    theirs = peft_model(config, base)
    layer = theirs.base_model.model[0]
    handle = rankwise.adapt_(ours, rankwise.catalog.randlora(rank=rank, alpha=6.0, pairing="peft"))
    scatter(handle)
    entry = handle.parameterization("0")
    with torch.no_grad():
        layer.randlora_lambda["default"].copy_(entry.Lambda)
        layer.randlora_gamma["default"].copy_(entry.Gamma)
        entry.bank["A"].copy_(layer.randlora_A["default"].squeeze(1).float())
        entry.bank["B"].copy_(layer.randlora_B["default"].float())
    x = torch.randn(5, n)
    error = ((ours(x) - theirs(x)).norm() / theirs(x).norm()).item()
    assert error < 1e-5, error


@pytest.mark.parametrize(("m", "n"), [(12, 8), (8, 12)])
def test_vb_lora_agrees_with_peft(m: int, n: int) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(n, m))
    ours = nn.Sequential(nn.Linear(n, m))
    ours.load_state_dict(base.state_dict())
    config = peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, topk=2, target_modules=["0"])
    theirs = peft_model(config, base).eval()
    layer = theirs.base_model.model[0]
    handle = rankwise.adapt_(ours, rankwise.catalog.vblora(rank=2, vectors=6, length=4, start="paper"))
    scatter(handle)
    entry = handle.parameterization("0")
    with torch.no_grad():
        layer.vblora_logits_A["default"].copy_(entry.logits_A)
        layer.vblora_logits_B["default"].copy_(entry.logits_B)
        layer.vblora_vector_bank["default"].copy_(entry.bank["vectors"])
    x = torch.randn(5, n)
    error = ((ours(x) - theirs(x)).norm() / theirs(x).norm()).item()
    assert error < 1e-5, error
