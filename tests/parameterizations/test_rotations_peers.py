"""Rotations, reflections and gains give what PEFT's layers give with the same tensors, where both say the same.

PEFT computes in float32, hence the tolerance. Its 3 × 3 convolutions under OFT are compared merged: their forward is wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise

peft = pytest.importorskip("peft")

M, N = 12, 8
TOLERANCE = 1e-5


def network(kind: str, bias: bool = True) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(N, M, bias=bias) if kind == "linear" else nn.Conv2d(N // 2, M, 3, padding=1, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return nn.Sequential(made)


def inputs(kind: str) -> Tensor:
    shape = (5, N) if kind == "linear" else (2, N // 2, 5, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def numbers(shape: tuple[int, ...], size: float, seed: int, around: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size + around


def compare(
    text: str, config: Any, names: dict[str, str], kind: str = "linear", *, size: float = 0.3, merged: bool = False
) -> None:
    """The same generic tensors in both; `names` gives PEFT's attribute for each role."""
    ours, theirs = network(kind), peft.get_peft_model(network(kind), config)
    handle = rankwise.adapt_(ours, rankwise.compose(text), where=["0"])
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        for seed, (role, tensor) in enumerate(handle.blocks()["0"].items()):
            held = getattr(layer, names[role])["default"]
            held = held.weight if isinstance(held, nn.Module) else held
            value = numbers(tuple(tensor.shape), size, 10 + seed, 1.0 if role in ("gain", "strength") else 0.0)
            tensor.copy_(value)
            held.copy_(value.reshape(held.shape))
        if merged:
            layer.merge()
        x = inputs(kind)
        expected = theirs(x)
        assert (expected - network(kind)(x)).norm() > 1e-3 * expected.norm(), "the peer changes something"
        error = ((ours(x) - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE, f"{text}: {error:.2e} from the peer"


@pytest.mark.parametrize(
    ("arguments", "theirs"),
    [
        ("", {"use_cayley_neumann": False}),
        *((f", cayley='neumann', terms={t}", {"num_cayley_neumann_terms": t}) for t in (2, 3, 4, 5, 6)),
        (", share_blocks=True", {"use_cayley_neumann": False, "block_share": True}),
        (", constrain=0.2", {"use_cayley_neumann": False, "coft": True, "eps": 0.2}),
    ],
)
def test_oft(arguments: str, theirs: dict[str, Any]) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], **theirs)
    compare(f"oft(block=4{arguments})", config, {"skew": "oft_R"}, size=0.1)


def test_oft_on_a_convolution_is_their_merged_weight() -> None:
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=False)
    compare("oft(block=4)", config, {"skew": "oft_R"}, "conv", merged=True)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT says that its extension is missing
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_boft_of_one_level(kind: str) -> None:
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    compare("boft(block=4)", config, {"blocks": "boft_R", "gain": "boft_s"}, kind)


def test_boft_of_three_levels_has_their_permutations_and_their_product() -> None:
    """Their layer needs an extension for it; the functions it is made of do not."""
    from peft.tuners.boft.layer import BOFTLayer

    n, block, factors = 16, 2, 3
    handle = rankwise.adapt_(nn.Sequential(nn.Linear(n, 4)), rankwise.compose(f"boft(block={block}, factors={factors})"))
    entry: Any = handle.parameterization("0")
    with torch.no_grad():
        entry.blocks.copy_(numbers(tuple(entry.blocks.shape), 0.4, 7))
    product = torch.eye(n)
    for level in range(factors):
        theirs = BOFTLayer.block_butterfly_perm(None, n, n // block // 2**level, block // 2, factors - 1)
        assert torch.equal(entry.permutation[level], theirs)
        P = BOFTLayer.perm2mat(None, theirs)
        turned = BOFTLayer.cayley_batch(None, entry.blocks[level].detach())
        product = P @ torch.block_diag(*turned) @ P.t() @ product
    torch.testing.assert_close(entry.rotation().dense().detach(), product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra(kind: str, gram_schmidt: bool) -> None:
    text = "hra(rank=4, gram_schmidt=True, start='random')" if gram_schmidt else "hra(rank=4)"
    compare(text, peft.HRAConfig(r=4, apply_GS=gram_schmidt, target_modules=["0"]), {"U": "hra_u"}, kind)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_ia3(kind: str, side: str) -> None:
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if side == "input" else [])
    compare(f"ia3(side='{side}')", config, {"gain": "ia3_l"}, kind)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road(variant: int) -> None:
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=6, target_modules=["0"])
    compare(f"road(variant={variant}, group=6)", config, {"angle": "road_theta", "gain": "road_alpha"})


def test_delora_from_zero() -> None:
    config = peft.DeloraConfig(r=4, delora_lambda=15, target_modules=["0"])
    names = {"A": "delora_A", "B": "delora_B", "strength": "delora_lambda"}
    compare("delora(rank=4, start='zero')", config, names)
