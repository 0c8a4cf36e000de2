"""Gradient clipping and the vanishing-gradient penalty against their spec (arXiv:1211.5063).

Clipping is seen through the optimizer shell with plain SGD at rate 1 from zero, so that what is clipped is what was moved.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rankwise
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.step import SiteBlock
from rankwise.steps import clipping
from tests.oracles.tools_training import normal, relative

Tensors = dict[str, dict[str, Tensor]]
M, N, RANK = 6, 5, 2


def moved(
    gradients: list[Tensors], text: str, *, at: Tensors | None = None, scale: float = 1.0, plain: tuple[str, ...] = ()
) -> list[Tensors]:
    """What the recipe's steps make of these gradients, at a fixed point."""
    first = gradients[0]
    blocks = {
        site: {role: torch.nn.Parameter(at[site][role].clone() if at else torch.zeros_like(g)) for role, g in block.items()}
        for site, block in first.items()
    }
    start = {site: {role: tensor.detach().clone() for role, tensor in block.items()} for site, block in blocks.items()}
    facts = {site: SiteBlock(site=site, scale=scale) for site in blocks}
    optimizer = BlockOptimizer(blocks, rankwise.compose(text).steps(), 1.0, facts=facts, plain=plain)
    found = []
    for given in gradients:
        with torch.no_grad():
            for site, block in blocks.items():
                for role, tensor in block.items():
                    tensor.copy_(start[site][role])
                    tensor.grad = given[site][role].clone()
        optimizer.step()
        found.append({s: {role: start[s][role] - tensor.detach() for role, tensor in b.items()} for s, b in blocks.items()})
    return found


def flat(block: Tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensors in block.values() for tensor in tensors.values()])


def drawn(seed: int) -> Tensors:
    return {
        "one": {"A": normal(seed, RANK, N), "B": normal(seed + 1, M, RANK)},
        "two": {"A": normal(seed + 2, RANK, 9), "B": normal(seed + 3, 4, RANK), "magnitude": normal(seed + 4, 4)},
        "head": {"weight": normal(seed + 5, 3, 4), "bias": normal(seed + 6, 3)},
    }


def sgd_with(arguments: str) -> str:
    return f"lora + sgd + theory_gradient_clipping({arguments})"


def test_1_a_short_gradient_is_left_to_the_bit() -> None:
    G = drawn(0)
    c = float(flat(G).norm()) * (1 + 1e-9)
    (found,) = moved([G], sgd_with(f"max_norm={c}"), plain=("head",))
    assert torch.equal(flat(found), flat(G))


@pytest.mark.parametrize("share", [0.999, 0.1, 1e-6])
def test_1_a_long_gradient_gets_the_length_and_keeps_the_direction(share: float) -> None:
    G = drawn(0)
    c = float(flat(G).norm()) * share
    (found,) = moved([G], sgd_with(f"max_norm={c}"), plain=("head",))
    assert float(flat(found).norm()) == pytest.approx(c, rel=1e-7)
    assert relative(flat(found) / flat(found).norm(), flat(G) / flat(G).norm()) < 1e-7


def test_2_splitting_tensors_changes_nothing() -> None:
    G = normal(10, 12, 4)
    whole = moved([{"one": {"weight": G}}], sgd_with("max_norm=1.0"))[0]["one"]["weight"]
    split = moved([{"one": {"x": G[:5], "y": G[5:7]}, "two": {"x": G[7:]}}], sgd_with("max_norm=1.0"))[0]
    assert relative(torch.cat([split["one"]["x"], split["one"]["y"], split["two"]["x"]]), whole) < 1e-7
    assert float(whole.norm()) == pytest.approx(1.0, rel=1e-7)


def test_2_it_is_not_clipping_of_each_tensor() -> None:
    G = {"one": {"A": torch.tensor([[3.0, 0.0]]).double(), "B": torch.tensor([[0.0], [4.0]]).double()}}
    (found,) = moved([G], sgd_with("max_norm=1.0"))
    assert float(found["one"]["A"].norm()) == pytest.approx(0.6, rel=1e-7)
    assert float(found["one"]["B"].norm()) == pytest.approx(0.8, rel=1e-7)


def test_2_by_role_each_group_of_factors_has_its_own_length() -> None:
    """Variant (b): all A of the model jointly, all B jointly."""
    G = {site: {role: g for role, g in block.items() if role in "AB"} for site, block in drawn(20).items() if site != "head"}
    G["one"]["B"] *= 1e-3
    G["two"]["B"] *= 1e-3
    (found,) = moved([G], sgd_with("max_norm=1.0, mode='per_role'"))
    before = torch.cat([G[site]["A"].reshape(-1) for site in G])
    after = torch.cat([found[site]["A"].reshape(-1) for site in G])
    assert relative(after, before / before.norm()) < 1e-7
    for site in G:
        assert torch.equal(found[site]["B"], G[site]["B"])


@pytest.mark.parametrize("scale", [1.0, 0.5, 16.0])
def test_3_effective_norm_needs_no_large_matrix(scale: float) -> None:
    B, A, d_B, d_A = normal(30, M, RANK), normal(31, RANK, N), normal(32, M, RANK), normal(33, RANK, N)
    dense = scale * (d_B @ A + B @ d_A)
    assert float(clipping.effective_norm(B, A, d_B, d_A, scale)) == pytest.approx(float(dense.norm()), rel=1e-6)
    cancelling = clipping.effective_norm(B, A, B, -A, scale)  # moves along the orbit of the factorization
    assert float(cancelling) < 1e-6 * float((scale * B @ A).norm())


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_3_effective_clipping_bounds_the_change_of_each_weight(scale: float) -> None:
    at, G = drawn(40), drawn(50)
    at.pop("head"), G.pop("head")

    def effective(block: dict[str, Tensor], site: str) -> float:
        return float(scale * (block["B"] @ at[site]["A"] + at[site]["B"] @ block["A"]).norm())

    sizes = {site: effective(G[site], site) for site in G}
    c = (min(sizes.values()) * max(sizes.values())) ** 0.5  # one is clipped, the other is not
    (found,) = moved([G], sgd_with(f"max_norm={c}, mode='effective'"), at=at, scale=scale)
    for site in G:
        factor = min(1.0, c / sizes[site])
        assert effective(found[site], site) == pytest.approx(factor * sizes[site], rel=1e-7)
        for role in ("A", "B"):
            assert relative(found[site][role], factor * G[site][role]) < 1e-7
    own = G["two"]["magnitude"]
    assert relative(found["two"]["magnitude"], own * min(1.0, c / float(own.norm()))) < 1e-7


def test_3_effective_clipping_bounds_other_tensors_by_their_own_norm() -> None:
    G = {"head": {"weight": normal(60, 3, 4), "bias": 1e-3 * normal(61, 3)}}
    (found,) = moved([G], sgd_with("max_norm=0.5, mode='effective'"), plain=("head",))
    assert float(found["head"]["weight"].norm()) == pytest.approx(0.5, rel=1e-7)
    assert relative(found["head"]["bias"], G["head"]["bias"]) < 1e-12


def chain(W: Tensor, x: Tensor, length: int) -> list[Tensor]:
    states = [x]
    for _ in range(length):
        states.append(W @ states[-1])
    return states


@pytest.mark.parametrize(("size", "term", "tolerance"), [(1.0, 0.0, 1e-28), (0.5, 0.25, 1e-12), (2.0, 1.0, 1e-12)])
def test_4_penalty_of_a_linear_chain(size: float, term: float, tolerance: float) -> None:
    d, length = 6, 7
    W = (size * torch.linalg.qr(normal(70, d, d))[0]).requires_grad_()
    states = chain(W, normal(71, d).requires_grad_(), length)
    omega = clipping.vanishing_penalty(states, (states[-1] * normal(72, d)).sum())
    assert abs(float(omega) - length * term) < tolerance


def test_4_penalty_is_trained_through_the_factors_alone() -> None:
    """Its gradient takes every dE/dx as constant."""
    d, length = 5, 4
    W = (0.7 * normal(73, d, d)).requires_grad_()
    states = chain(W, normal(74, d).requires_grad_(), length)
    loss = (states[-1] - normal(75, d)).square().sum()
    received = [v.detach() for v in torch.autograd.grad(loss, states[1:], retain_graph=True)]
    (found,) = torch.autograd.grad(clipping.vanishing_penalty(states, loss), W)
    leaf = W.detach().clone().requires_grad_()
    expected = sum(((leaf.T @ v).norm() / v.norm() - 1) ** 2 for v in received)
    (gradient,) = torch.autograd.grad(expected, leaf)
    assert relative(found, gradient) < 1e-10


@pytest.mark.parametrize("quantile", ["", ", quantile=0.9"])
def test_5_adam_with_an_unused_clip_is_adam(quantile: str) -> None:
    gradients = [{"one": {"A": g * normal(80, RANK, N), "B": g * normal(81, M, RANK)}} for g in (4.0, 2.0, -1.0, 0.5, 0.25)]
    clipped = moved(gradients, f"lora + adamw + theory_gradient_clipping(max_norm=1e3{quantile})")
    free = moved(gradients, "lora + adamw")
    for one, other in zip(clipped, free, strict=True):
        assert torch.equal(flat(one), flat(other)) or quantile  # norms that never rise are never clipped
        assert relative(flat(one), flat(other)) < 1e-12
    tight = moved(gradients, "lora + adamw + theory_gradient_clipping(max_norm=1.0)")
    assert relative(flat(tight[-1]), flat(free[-1])) > 1e-3


def test_5_running_quantile_holds_back_an_outlier() -> None:
    """Within what an online estimate of the quantile may be off by."""
    G = normal(82, 3, 4)
    G = G / G.norm()
    gradients = [{"one": {"weight": G}} for _ in range(20)] + [{"one": {"weight": 100 * G}}, {"one": {"weight": 0.5 * G}}]
    found = [float(block["one"]["weight"].norm()) for block in moved(gradients, sgd_with("quantile=0.9"))]
    assert found[:20] == pytest.approx([1.0] * 20, rel=0.02)
    assert found[20] == pytest.approx(1.0, rel=0.15)
    assert found[21] == pytest.approx(0.5, rel=1e-7)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_5_running_quantile_clips_the_rest(quantile: float) -> None:
    G, norms = normal(83, 3, 4), (0.5 * normal(84, 600)).exp()
    gradients = [{"one": {"weight": size * G / G.norm()}} for size in norms]
    found = torch.stack([block["one"]["weight"].norm() for block in moved(gradients, sgd_with(f"quantile={quantile}"))])
    clipped = found < norms * (1 - 1e-9)
    assert float(clipped[200:].double().mean()) == pytest.approx(1 - quantile, abs=0.05)
    lengths = found[200:][clipped[200:]]
    assert float(lengths.mean()) == pytest.approx(float(norms.quantile(quantile)), rel=0.1)


@pytest.mark.parametrize("w", [0.5, -2.0])
def test_6_scalar_chain_multiplies_the_gradient_by_its_weight(w: float) -> None:
    length = 6
    W = torch.tensor([[w]], dtype=torch.float64)
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    states = chain(W.requires_grad_(), x, length)
    omega = clipping.vanishing_penalty(states, states[-1].sum())
    assert float(omega) == pytest.approx(length * (abs(w) - 1) ** 2, rel=1e-14)
    (factor,) = torch.autograd.grad(states[-1].sum(), x)
    assert float(factor) == w**length


def test_clipping_follows_the_preconditioner() -> None:
    """The pitfall: with preconditioned methods the length is that after the transform."""
    at = {"one": {"A": 0.1 * normal(90, RANK, N), "B": 0.1 * normal(91, M, RANK)}}
    G = {"one": {"A": normal(92, RANK, N), "B": normal(93, M, RANK)}}
    (free,) = moved([G], "lora + sgd + scaled_gd(damping=0.0)", at=at)
    (found,) = moved([G], "lora + sgd + scaled_gd(damping=0.0) + theory_gradient_clipping(max_norm=2.0)", at=at)
    assert float(flat(free).norm()) > 20.0
    assert relative(flat(found), flat(free) * 2.0 / flat(free).norm()) < 1e-7
