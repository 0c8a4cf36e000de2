"""SST against its spec (arXiv:2405.15481): weights kept as U diag(S) Vᵀ, all of S trained and a sampled handful of vectors.

`whole` puts U and V together, trained columns in their places; a run is compared step by step with the algorithm in dense
matrices. The warm-up is 0 wherever the size of a step matters. Hyperbolic layers and published perplexities are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handle import Handle
from rankwise.procedures.sst import probabilities
from tests.oracles.tools_training import SITE, adapted, normal, relative, with_spectrum

M, N, RANK = 7, 5, 2
K = min(M, N)
FOREVER = 10**6


def begin(
    *,
    weight: Tensor | None = None,
    rank: int = RANK,
    lr: float = 0.05,
    step: str = "sgd",
    seed: int = 1,
    warmup: int = 0,
    **more,
):
    recipe = rankwise.compose(rankwise.catalog.sst(rank=rank, warmup=warmup, **{"interval": 4, **more}), step)
    model, handle = adapted(normal(0, M, N) if weight is None else weight, recipe, seed=seed)
    return model, handle, handle.optimizer(lr)


def active(handle: Handle) -> Tensor:
    return handle.parameterization(SITE).active.detach().clone()


def whole(handle: Handle) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) with the trained columns in their places, copied."""
    entry, block = handle.parameterization(SITE), handle.blocks()[SITE]
    U, V = entry.U.detach().clone(), entry.V.detach().clone()
    U[:, entry.active], V[:, entry.active] = block["U_active"].detach(), block["V_active"].detach()
    return U, block["S"].detach().clone(), V


def product(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return (U * S) @ V.T


def effective(handle: Handle) -> Tensor:
    return product(*whole(handle))


def loss_of(t: int, m: int = M, n: int = N) -> Callable[[nn.Module], Tensor]:
    x, y = normal(100 + t, 12, n), normal(200 + t, 12, m)
    return lambda model: ((model(x) - y) ** 2).sum() / 10


def gradient_at(W: Tensor, t: int) -> Tensor:
    """dL/dW of `loss_of`."""
    x, y = normal(100 + t, 12, W.shape[1]), normal(200 + t, 12, W.shape[0])
    return 2 * (x @ W.T - y).T @ x / 10


def one_step(model: nn.Module, handle: Handle, optimizer, t: int, m: int = M, n: int = N) -> None:
    handle.backward(lambda: loss_of(t, m, n)(model))
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()


def unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(M, N), (N, M), (6, 6)])
def test_1_the_start_is_the_weight(dtype: torch.dtype, tolerance: float, shape: tuple[int, int]) -> None:
    m, n = shape
    weight, k = normal(0, m, n).to(dtype), min(m, n)
    model, handle, _ = begin(weight=weight)
    U, S, V = whole(handle)
    assert (U.shape, S.shape, V.shape) == ((m, k), (k,), (n, k))
    eye = torch.eye(k, dtype=dtype)
    assert relative(product(U, S, V), weight) < tolerance
    assert relative(U.T @ U, eye) < tolerance * 10
    assert relative(V.T @ V, eye) < tolerance * 10
    assert relative(S.sort(descending=True).values, torch.linalg.svdvals(weight)) < tolerance * 10
    x = normal(1, 6, n).to(dtype)
    assert relative(model(x), x @ weight.T) < tolerance * 10
    assert {role: tuple(tensor.shape) for role, tensor in handle.blocks()[SITE].items()} == {
        "S": (k,),
        "U_active": (m, RANK),
        "V_active": (n, RANK),
    }
    assert handle.trained_numbers == k + RANK * (m + n)
    assert active(handle).dtype is torch.long
    assert len(set(active(handle).tolist())) == RANK


def test_1_a_new_svd_does_not_move_the_function() -> None:
    """Two iterations of three steps, then the SVD: U and V are orthonormal again, and W' is what it was."""
    model, handle, optimizer = begin(interval=3, iterations=2)
    x, eye = normal(1, 6, N), torch.eye(K, dtype=torch.float64)
    for t in range(12):
        U, S, V = whole(handle)
        chosen, G = active(handle), gradient_at(effective(handle), t)
        one_step(model, handle, optimizer, t)
        expected_S = (S - 0.05 * torch.einsum("mi,mn,ni->i", U, G, V)).clamp(min=0)
        for matrix, direction in ((U, G @ V[:, chosen]), (V, G.T @ U[:, chosen])):
            matrix.index_copy_(1, chosen, unit(matrix[:, chosen] - 0.05 * direction))
        assert relative(effective(handle), product(U, expected_S, V)) < 1e-9
        assert relative(model(x), x @ effective(handle).T) < 1e-12
        assert relative(normal(0, M, N) + handle.update_of(SITE).dense().detach(), effective(handle)) < 1e-12
        U, S, V = whole(handle)
        skew = max(float((Q.T @ Q - eye).norm()) for Q in (U, V))
        if t % 6 == 5:
            assert skew < 1e-12
            assert relative(S.sort(descending=True).values, torch.linalg.svdvals(effective(handle))) < 1e-12
        else:
            assert skew > 1e-3


@pytest.mark.parametrize("iterations", [None, 1, 2])
def test_1_rounds_are_as_long_as_asked(iterations: int | None) -> None:
    """None means ⌈k/r⌉ iterations between two SVDs."""
    model, handle, optimizer = begin(interval=2, iterations=iterations)
    length, eye, found = 2 * (iterations or math.ceil(K / RANK)), torch.eye(K, dtype=torch.float64), []
    for t in range(2 * length):
        one_step(model, handle, optimizer, t)
        U, _, _ = whole(handle)
        if float((U.T @ U - eye).norm()) < 1e-10:
            found.append(t)
    assert found == [length - 1, 2 * length - 1]


def test_2_gradients() -> None:
    """g_S,i = u_iᵀ G v_i, and the enhanced G v_i and Gᵀ u_i: what autograd gives through the factors, without S_i."""
    model, handle, optimizer = begin(interval=FOREVER)
    for t in range(3):
        one_step(model, handle, optimizer, t)
    U, S, V = (tensor.requires_grad_() for tensor in whole(handle))
    chosen, block = active(handle), handle.blocks()[SITE]
    G = gradient_at(effective(handle), 9)
    handle.backward(lambda: loss_of(9)(model))
    x, y = normal(109, 12, N), normal(209, 12, M)
    (((x @ product(U, S, V).T - y) ** 2).sum() / 10).backward()
    assert relative(block["S"].grad, torch.einsum("mi,mn,ni->i", U.detach(), G, V.detach())) < 1e-12
    assert relative(block["S"].grad, S.grad) < 1e-12
    for role, matrix, direction in (("U_active", U, G @ V.detach()), ("V_active", V, G.T @ U.detach())):
        assert relative(block[role].grad, direction[:, chosen]) < 1e-12
        assert relative(block[role].grad, (matrix.grad / S.detach())[:, chosen]) < 1e-9
    optimizer.step()
    handle.after_step()


def test_2_small_singular_values_learn_too() -> None:
    """At S_i = 0 the true gradient of the vectors is zero, the enhanced one is not."""
    weight = with_spectrum(3, M, N, [3.0, 2.0, 1.0, 0.0, 0.0])
    model, handle, _ = begin(weight=weight, rank=K)
    handle.backward(lambda: loss_of(0)(model))
    block, (U, _, V) = handle.blocks()[SITE], whole(handle)
    G = gradient_at(weight, 0)
    assert relative(block["U_active"].grad, (G @ V)[:, active(handle)]) < 1e-9
    assert relative(block["V_active"].grad, (G.T @ U)[:, active(handle)]) < 1e-9
    assert float(block["U_active"].grad.norm(dim=0).min()) > 1e-3


def test_2_the_input_gets_its_gradient() -> None:
    model, handle, optimizer = begin(interval=FOREVER)
    one_step(model, handle, optimizer, 0)
    x = normal(1, 3, 4, N).requires_grad_()
    cotangent = normal(2, 3, 4, M)
    (model(x) * cotangent).sum().backward()
    assert relative(x.grad, cotangent @ effective(handle)) < 1e-12


@pytest.mark.parametrize("rank", [1, RANK, K])
def test_3_descent_to_first_order(rank: int) -> None:
    """⟨dW, G⟩ = -η [Σ g_S,i² + Σ_active S_i (‖G v_i‖² + ‖Gᵀ u_i‖² - 2 g_S,i²)]."""
    lr = 1e-8
    model, handle, optimizer = begin(rank=rank, lr=lr, interval=FOREVER)
    (U, S, V), chosen, before = whole(handle), active(handle), effective(handle)
    G = gradient_at(before, 0)
    one_step(model, handle, optimizer, 0)
    g = torch.einsum("mi,mn,ni->i", U, G, V)
    vectors = (G @ V).square().sum(0) + (G.T @ U).square().sum(0) - 2 * g**2
    expected = -lr * (g.square().sum() + (S * vectors)[chosen].sum())
    found = ((effective(handle) - before) * G).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) < 0


def test_4_active_vectors_have_length_one_and_the_others_rest() -> None:
    model, handle, optimizer = begin(interval=FOREVER, lr=0.2)
    (U, _, V), chosen = whole(handle), active(handle)
    rest = torch.tensor([i for i in range(K) if i not in chosen.tolist()])
    for t in range(6):
        one_step(model, handle, optimizer, t)
        block = handle.blocks()[SITE]
        for role in ("U_active", "V_active"):
            assert float((block[role].detach().norm(dim=0) - 1).abs().max()) < 1e-6
        new_U, _, new_V = whole(handle)
        assert torch.equal(active(handle), chosen)
        assert torch.equal(new_U[:, rest], U[:, rest])
        assert torch.equal(new_V[:, rest], V[:, rest])
        assert float((new_U[:, chosen] - U[:, chosen]).norm()) > 1e-2
        assert float((new_V[:, chosen] - V[:, chosen]).norm()) > 1e-2


def test_5_probabilities() -> None:
    S = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    p = probabilities(S)
    assert relative(p, 0.5 * (1 / 5 + S / 8)) < 1e-12
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(p.min()) >= 1 / 10 - 1e-12


def test_5_probabilities_give_the_frequencies() -> None:
    """1e5 draws of one index each."""
    p = probabilities(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    drawn = torch.multinomial(p, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert float((torch.bincount(drawn, minlength=5) / 1e5 - p).abs().max()) < 0.008  # five standard errors


def test_5_the_library_samples_so() -> None:
    """1200 iterations of one vector each on 30 equal layers; five standard errors."""
    S = [4.0, 2.0, 1.0, 1.0]
    weight = with_spectrum(5, 4, 4, S)
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(30)])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(weight)
    recipe = rankwise.compose(rankwise.catalog.sst(rank=1, interval=1, warmup=0, iterations=FOREVER), "sgd")
    handle = rankwise.adapt_(model, recipe, seed=3)
    optimizer, x, counts = handle.optimizer(0.0), normal(1, 2, 4), torch.zeros(4, dtype=torch.float64)
    for _ in range(40):
        handle.backward(lambda: model(x).square().sum())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        for site in handle.targets:
            entry = handle.parameterization(site)
            value = float(entry.roles()["S"].detach()[entry.active])  # equal values count together below
            counts[min(range(4), key=lambda i: abs(S[i] - value))] += 1
    p = probabilities(torch.tensor(S, dtype=torch.float64))
    joined = torch.stack([counts[0], counts[1], counts[2] + counts[3]]) / 1200
    expected = torch.stack([p[0], p[1], p[2] + p[3]])
    assert float(((joined - expected).abs() / (expected * (1 - expected) / 1200).sqrt()).max()) < 5


def test_5_without_replacement_and_anew() -> None:
    model, handle, optimizer = begin(rank=K - 1, interval=1, iterations=FOREVER)
    seen = set()
    for t in range(20):
        chosen = active(handle).tolist()
        assert len(set(chosen)) == K - 1
        assert set(chosen) <= set(range(K))
        seen.add(frozenset(chosen))
        one_step(model, handle, optimizer, t)
    assert len(seen) > 1
    again, same = begin(rank=K - 1)[1], begin(rank=K - 1)[1]
    assert torch.equal(active(again), active(same))


def test_6_one_step_can_have_full_rank() -> None:
    model, handle, optimizer = begin(rank=K, interval=FOREVER)
    one_step(model, handle, optimizer, 0)
    assert int(torch.linalg.matrix_rank(handle.update_of(SITE).dense(), rtol=1e-8)) == K
    model, handle, optimizer = begin(rank=1, interval=FOREVER)
    one_step(model, handle, optimizer, 0)
    assert int(torch.linalg.matrix_rank(handle.update_of(SITE).dense(), rtol=1e-8)) == K  # all singular values move


def test_7_singular_values_stay_nonnegative() -> None:
    """A linear loss pulls the largest one below zero, where it is held; the order is lost then."""
    weight = with_spectrum(3, M, N, [3.0, 2.0, 1.0, 0.05, 0.02])
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    C = (U * torch.tensor([11.0, 0.0, 0.0, 1.0, -5.0])) @ Vh
    model, handle, optimizer = begin(weight=weight, lr=0.3, interval=FOREVER)
    handle.backward(lambda: (model(torch.eye(N, dtype=torch.float64)).T * C).sum())
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()
    S = whole(handle)[1]
    expected = torch.tensor([0.0, 2.0, 1.0, 0.0, 1.52], dtype=torch.float64)
    assert float((S - expected).abs().max()) < 1e-12
    for t in range(6):
        (U, S, V), G = whole(handle), gradient_at(effective(handle), t)
        moved = S - 0.3 * torch.einsum("mi,mn,ni->i", U, G, V)
        one_step(model, handle, optimizer, t)
        assert float((whole(handle)[1] - moved.clamp(min=0)).norm()) < 1e-9 * float(moved.norm())


def test_8_a_swap_does_not_move_the_function() -> None:
    """Trained columns are written back before others are taken out; with rate 0 the output does not change at all."""
    model, handle, optimizer = begin(interval=2, iterations=FOREVER)
    for t in range(5):
        one_step(model, handle, optimizer, t)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    x = normal(1, 6, N)
    before, (U, S, V), sets = model(x).detach(), whole(handle), set()
    for t in range(12):
        one_step(model, handle, optimizer, t)
        sets.add(frozenset(active(handle).tolist()))
        assert relative(model(x), before) < 1e-14
        for found, expected in zip(whole(handle), (U, S, V), strict=True):
            assert relative(found, expected) < 1e-14
    assert len(sets) > 1


def test_8_columns_may_be_permuted() -> None:
    model, handle, optimizer = begin(interval=FOREVER)
    one_step(model, handle, optimizer, 0)
    x, entry = normal(1, 6, N), handle.parameterization(SITE)
    before, order = model(x).detach(), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        entry.U.copy_(entry.U[:, order].clone())
        entry.V.copy_(entry.V[:, order].clone())
        entry.roles()["S"].copy_(entry.roles()["S"][order].clone())
        entry.active.copy_(order.argsort()[entry.active])
    assert relative(model(x), before) < 1e-14
    assert relative(model(x), x @ effective(handle).T) < 1e-13


def test_moments_follow_the_columns() -> None:
    """At a swap those of the vectors are reset and those of S kept: the first step of AdamW then is η in every entry."""
    lr = 1e-3
    model, handle, optimizer = begin(lr=lr, step="adamw", interval=3, iterations=FOREVER)
    for t in range(9):
        if t % 3 == 0 and t:
            block = handle.blocks()[SITE]
            for role in ("U_active", "V_active"):
                state = optimizer.state.get(block[role], {})
                assert not any(value.any() for value in state.values() if value.shape == block[role].shape)
            assert any(bool(value.any()) for value in optimizer.state[block["S"]].values() if value.shape == (K,))
        one_step(model, handle, optimizer, t)
        block = handle.blocks()[SITE]
        if t % 3 != 2:
            assert any(
                bool(value.any())
                for value in optimizer.state[block["U_active"]].values()
                if value.shape == block["U_active"].shape
            )


def test_every_iteration_warms_up() -> None:
    """The first steps after a swap are smaller than without a warm-up, the later ones are not."""
    sizes = []
    for warmup in (0, 4):
        model, handle, optimizer = begin(lr=1e-4, interval=8, iterations=FOREVER, warmup=warmup)
        found = []
        for t in range(16):
            before = effective(handle)
            one_step(model, handle, optimizer, t)
            found.append(float((effective(handle) - before).norm()))
        sizes.append(found)
    ratios = [two / one for one, two in zip(*sizes, strict=True)]
    for start in (0, 8):
        assert ratios[start] < 0.8
        assert all(ratios[start + i] < 1.05 for i in range(4))
        assert all(ratio == pytest.approx(1.0, abs=0.1) for ratio in ratios[start + 5 : start + 8])


def test_training_goes_down() -> None:
    model, handle, optimizer = begin(lr=0.02, interval=4, iterations=2)
    x, goal = normal(5, 30, N), normal(6, M, N)
    losses = []
    for _ in range(150):
        losses.append(float(handle.backward(lambda: ((model(x) - x @ goal.T) ** 2).mean())))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
