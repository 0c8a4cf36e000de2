"""Silent errors of others that concern methods with shared tensors: 7 (VB-LoRA, NOLA), 8, 46, 47 and 48, on this library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import RecipeError
from tests.never_silent.models import adapted, inputs, mlp

BANKED = [
    "nola(rank=2, bases_A=5, bases_B=7)",
    "tied_lora(rank=2)",
    "lotr(rank=2)",
    "vblora(rank=2, vectors=5, length=4)",
    "randlora(rank=3, alpha=6.0)",
    "intrinsic_dimension(dimension=5)",
]


@pytest.mark.parametrize("text", BANKED)
def test_07_the_default_start_is_the_base_and_a_published_one_beside_it_must_be_asked_for(text: str) -> None:
    net = mlp(4)
    expected = net(inputs())
    rankwise.adapt_(net, rankwise.compose(text))
    assert float((net(inputs()) - expected).abs().max()) <= 1e-14
    published = {"vblora": "start='paper'", "nola": "variant='vit'"}.get(text.partition("(")[0])
    if published is not None:
        other = mlp(4)
        recipe = rankwise.compose(text.replace(")", f", {published})"))
        assert not recipe.method.facts_of(**recipe.parameterization.arguments).starts_at_base
        rankwise.adapt_(other, recipe)
        assert float((other(inputs()) - expected).abs().max()) > 1e-7


def paper(A: Tensor, B: Tensor, Lambda: Tensor, Gamma: Tensor) -> Tensor:
    """Σ_j B_j diag(Λ[:, j]) A diag(Γ[j]), basis by basis."""
    bases = range(Gamma.shape[0])
    return sum((B[:, j] @ torch.diag(Lambda[:, j]) @ A @ torch.diag(Gamma[j]) for j in bases), torch.zeros(()))  # type: ignore[return-value]


def released(A: Tensor, B: Tensor, Lambda: Tensor, Gamma: Tensor) -> Tensor:
    """Column i of B flattened over (j, k) meets row i of A flattened over (k, j)."""
    r, N = Lambda.shape
    total = torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype)
    for i in range(N * r):
        total = total + torch.outer(B[:, i // r, i % r], Lambda[i // N, i % N] * A[i // N] * Gamma[i % N])
    return total


@pytest.mark.parametrize("pairing", ["paper", "peft"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_08_randlora_pairs_its_bases_as_it_says(pairing: str, rank: int) -> None:
    handle = adapted(mlp(1), f"randlora(rank={rank}, alpha=6.0, pairing='{pairing}')")
    entry = handle.parameterization("0")
    parts = (entry.bank["A"], entry.bank["B"], entry.Lambda, entry.Gamma)
    formulas = {"paper": paper(*parts) * entry.scale, "peft": released(*parts) * entry.scale}
    found = handle.update_of("0").dense()
    torch.testing.assert_close(found, formulas.pop(pairing), rtol=1e-12, atol=1e-12)
    other = formulas.popitem()[1]
    difference = float(((found - other).norm() / other.norm()).detach())
    assert difference < 1e-12 if rank in (1, 8) else difference > 0.3, difference


@pytest.mark.parametrize("text", BANKED)
def test_46_every_layer_and_every_shared_tensor_is_covered(text: str) -> None:
    net = mlp(4)
    handle = adapted(net, text)
    assert handle.coverage().count("  adapted  ") == 4
    trained = [p for p in net.parameters() if p.requires_grad]
    held = [tensor for block in handle.blocks().values() for tensor in block.values()]
    assert {id(p) for p in trained} == {id(p) for p in held} and len(held) == len(trained)
    assert handle.trained_numbers == sum(p.numel() for p in trained)


def test_46_layers_of_another_size_are_refused_by_name_and_not_left_untrained() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    with pytest.raises(RecipeError, match=r"(?s)1: vblora.*8 × 6|1: vblora.*6 × 8"):
        rankwise.adapt_(net, rankwise.compose("vblora(rank=2, vectors=5, length=4)"))


def kept_for_backward(net: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that a forward keeps, parameters left out and every storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(x)
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("text", ["tied_lora(rank=2)", "lotr(rank=2)", "nola(rank=2, bases_A=5, bases_B=7)"])
def test_47_a_half_precision_base_keeps_no_copy_of_its_inputs_in_float32(text: str) -> None:
    """What backward keeps beside the frozen base is less than one float32 copy of x per layer."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    net = mlp(4, dtype=torch.bfloat16)
    adapted(net, text)
    kept = kept_for_backward(net, x)
    assert kept < 4 * 4096 * 8 * (2 + 4), kept  # x in bfloat16 and less than one in float32, four layers


@pytest.mark.parametrize("text", BANKED)
@pytest.mark.parametrize("layers", [1, 4])
def test_48_a_file_holds_what_is_trained_and_each_shared_tensor_once(text: str, layers: int, tmp_path: Path) -> None:
    net = mlp(layers, dtype=torch.float32)
    handle = adapted(net, text)
    (file,) = handle.save(tmp_path).glob("*.safetensors")
    bank = sum(tensor.numel() for tensor in handle.bank.buffers())  # one copy of what is frozen and shared
    own = {"vblora": 2 * (2 * 2 + 2 * 2) * 2 * layers}.get(text.partition("(")[0], 0)  # choices of the frozen start
    assert sum(tensor.numel() for tensor in load_file(file).values()) <= handle.trained_numbers + bank + own
    if text.startswith(("nola", "randlora", "intrinsic")):  # drawn again: not even one copy
        assert sum(tensor.numel() for tensor in load_file(file).values()) == handle.trained_numbers
