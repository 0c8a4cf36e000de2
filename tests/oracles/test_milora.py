"""MiLoRA and MiCA against their spec (arXiv:2406.09044): the smallest singular components train, the principal ones are frozen.

Oracle 4 compares with the PiSSA start of Hugging Face's PEFT, the one place where a second implementation exists.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.operators import LowRank
from tests.oracles.tools_training import (
    SITE,
    adapted,
    normal,
    orthonormal,
    put,
    relative,
    roles_of,
    sine_of_angle,
    started,
    statistics_of,
    with_spectrum,
)

M, N, RANK, SCALE = 9, 7, 2, 2.0
SELECTIONS = ["smallest", "middle", "random", "largest"]
WEIGHT = normal(0, M, N)


def start_of(weight: Tensor = WEIGHT, rank: int = RANK, *, scale: float = 1.0, seed: int = 0, **options) -> LowRank:
    return started(rankwise.catalog.milora(rank=rank, **options), statistics_of(weight), rank, scale=scale, seed=seed)


def components(product: Tensor, weight: Tensor = WEIGHT) -> list[int]:
    """Which singular components of W a product is made of; it must be exactly a sum of some of them."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    weights = U.T @ product @ Vh.T / S
    assert relative((U * S * weights.diagonal().round()) @ Vh, product) < 1e-9
    return (weights.diagonal().round() == 1).nonzero().flatten().tolist()


@pytest.mark.parametrize("mode", ["offset", "absorb"])
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_1_first_output_is_the_base(mode: str, select: str, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = WEIGHT.to(dtype), normal(1, 11, N).to(dtype)
    recipe = rankwise.catalog.milora(rank=RANK, alpha=SCALE * RANK, select=select, mode=mode)
    model, handle = adapted(weight, recipe)
    assert relative(model(x), x @ weight.T) < tolerance
    trained = roles_of(handle)
    part = SCALE * trained["B"] @ trained["A"]
    assert float(part.norm()) > 0.1
    if mode == "absorb":  # W_res + s B A = W
        assert relative(model.get_submodule(SITE).weight + part, weight) < tolerance


@pytest.mark.parametrize(
    ("select", "expected"), [("smallest", [4, 5, 6]), ("largest", [0, 1, 2]), ("middle", [2, 3, 4]), ("random", None)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_1_which_components_train(select: str, expected: list[int] | None, transposed: bool) -> None:
    weight = WEIGHT.T.contiguous() if transposed else WEIGHT
    seen = set()
    for seed in range(10 if expected is None else 1):
        factors = start_of(weight, 3, select=select, seed=seed)
        found = components(factors.B @ factors.A, weight)
        assert len(found) == 3
        assert expected is None or found == expected
        seen.add(tuple(found))
    assert expected is not None or len(seen) > 3  # the seed decides


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_2_grams_are_the_singular_values(select: str, scale: float) -> None:
    factors = start_of(select=select, scale=scale)
    S = torch.linalg.svdvals(WEIGHT)[components(scale * factors.B @ factors.A)]
    assert torch.allclose(factors.B.T @ factors.B, torch.diag(S) / scale, atol=1e-12)
    assert torch.allclose(factors.A @ factors.A.T, torch.diag(S) / scale, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_3_it_takes_the_least_of_the_weight(rank: int) -> None:
    U, S, Vh = torch.linalg.svd(WEIGHT, full_matrices=False)
    factors = start_of(rank=rank, scale=SCALE)
    product = SCALE * factors.B @ factors.A
    energy = float(product.square().sum())
    assert energy == pytest.approx(float(S[-rank:].square().sum()), rel=1e-10)
    for chosen in itertools.combinations(range(N), rank):
        other = float(((U[:, chosen] * S[list(chosen)]) @ Vh[list(chosen)]).square().sum())
        assert energy <= other * (1 + 1e-10)
    left = torch.linalg.svdvals(WEIGHT - product)
    assert torch.allclose(left[: N - rank], S[: N - rank], rtol=1e-10)
    assert float(left[N - rank :].max()) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_4_largest_is_the_pissa_start_of_peft(scale: float) -> None:
    peft = pytest.importorskip("peft")
    weight = (0.2 * WEIGHT).float()
    model = nn.Sequential(nn.Linear(N, M, bias=False))
    model[0].weight.data.copy_(weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=scale * RANK, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.get_peft_model(model, config).base_model.model[0]
    theirs_A, theirs_B = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    ours = start_of(weight, scale=scale, select="largest")
    assert float((ours.B @ ours.A - theirs_B @ theirs_A).abs().max()) < 1e-6
    for k in range(RANK):  # column pairs up to a common sign
        sign = torch.sign(ours.A[k] @ theirs_A[k])
        assert float((ours.A[k] - sign * theirs_A[k]).abs().max()) < 1e-5
        assert float((ours.B[:, k] - sign * theirs_B[:, k]).abs().max()) < 1e-5


@pytest.mark.parametrize("select", SELECTIONS)
def test_4_full_rank_leaves_nothing_frozen(select: str) -> None:
    factors = start_of(rank=N, scale=SCALE, select=select)
    assert relative(SCALE * factors.B @ factors.A, WEIGHT) < 1e-10


@pytest.mark.parametrize("select", SELECTIONS)
def test_5_alpha_does_not_change_the_product(select: str) -> None:
    products = []
    for alpha in (RANK, 2 * RANK):
        _, handle = adapted(WEIGHT, rankwise.catalog.milora(rank=RANK, alpha=float(alpha), select=select))
        trained = roles_of(handle)
        products.append(alpha / RANK * trained["B"] @ trained["A"])
    assert relative(products[1], products[0]) < 1e-12


@pytest.mark.parametrize("select", ["smallest", "largest"])
def test_6_corda_with_white_inputs_gives_the_same_product(select: str) -> None:
    white = orthonormal(2, 50, N) * 50**0.5
    corda = rankwise.catalog.corda(rank=RANK, select=select)
    other = started(corda, statistics_of(WEIGHT, inputs=[white]), RANK, scale=SCALE)
    ours = start_of(scale=SCALE, select=select)
    assert relative(ours.B @ ours.A, other.B @ other.A) < 1e-9


def test_7_a_dead_start_does_not_go_unseen() -> None:
    """W of rank k - r: both factors would be zero and get no gradient for ever. Refused by name, or something does train."""
    weight = with_spectrum(3, M, N, [3.0, 2.0, 1.5, 1.0, 0.5])
    assert float(torch.linalg.svdvals(weight)[N - RANK :].max()) < 1e-12  # the definition gives B = A = 0, up to rounding
    x, cotangent = normal(4, 8, N), normal(5, 8, M)
    try:
        model, handle = adapted(weight, rankwise.catalog.milora(rank=RANK))
    except rankwise.RankwiseError as error:
        assert SITE in str(error)
        return
    assert relative(model(x), x @ weight.T) < 1e-12
    (model(x) * cotangent).sum().backward()
    gradients = [tensor.grad for tensor in handle.blocks()[SITE].values()]
    assert max(float(gradient.norm()) for gradient in gradients if gradient is not None) > 1e-3


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_8_mica_trains_the_input_factor_alone(shape: tuple[int, int]) -> None:
    weight = normal(6, *shape)
    x, cotangent = normal(7, 8, shape[1]), normal(8, 8, shape[0])
    model, handle = adapted(weight, rankwise.catalog.mica(rank=RANK))
    assert torch.equal(model(x), nn.functional.linear(x, weight))
    assert not handle.update_of(SITE).dense().any()
    entry = handle.parameterization(SITE)
    B = dict(entry.named_buffers(), **dict(entry.named_parameters()))["B"]
    assert torch.allclose(B.T @ B, torch.eye(RANK, dtype=torch.float64), atol=1e-12)
    U = torch.linalg.svd(weight, full_matrices=False)[0]
    assert sine_of_angle(B, U[:, -RANK:]) < 1e-10
    assert set(handle.blocks()[SITE]) == {"A"}
    (model(x) * cotangent).sum().backward()
    assert B.grad is None
    assert not B.requires_grad
    (A,) = handle.blocks()[SITE].values()
    assert A.grad is not None
    assert relative(A.grad, entry.scale * B.T @ cotangent.T @ x) < 1e-12
    put(handle, {"A": normal(9, *A.shape)})
    assert relative(handle.update_of(SITE).dense(), entry.scale * B @ A) < 1e-12
    assert torch.equal(model.get_submodule(SITE).weight, weight)
