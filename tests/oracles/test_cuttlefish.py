"""Cuttlefish against its spec (arXiv:2305.02538): train whole until the stable ranks rest, then switch once to B A.

The oracles are the spec's list in its order. The profiling of layer speeds (K) is a matter for benchmarks; released special
cases for the last one or two layers of two networks are left out.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.procedures.cuttlefish import Watch, frobenius_gradient, stable_rank, target_rank
from tests.oracles.tools_training import SITE, layer_model, normal, orthonormal, relative, truncated, with_spectrum

M, N = 8, 6


def begin(weight: Tensor, *, lr: float = 0.0, **arguments):
    """(model, handle, optimizer) of one layer without bias, with plain SGD; an epoch is one step unless said."""
    model = layer_model(weight)
    handle = rw.adapt_(model, rw.compose(rw.catalog.cuttlefish(**{"interval": 1, **arguments}), "sgd"))
    return model, handle, handle.optimizer(lr)


def roles(handle: rw.Handle) -> dict[str, nn.Parameter]:
    return handle.parameterization(SITE).roles()


def train(begun, loss, steps: int = 1) -> None:
    _, handle, optimizer = begun
    for _ in range(steps):
        handle.backward(loss)
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def switched(weight: Tensor, **arguments):
    """Begun, and trained at a rate of zero until it has switched."""
    begun = begin(weight, **arguments)
    train(begun, lambda: begun[0](normal(1, 3, weight.shape[1])).square().sum(), 17)
    assert set(roles(begun[1])) == {"B", "A"}
    return begun


@pytest.mark.parametrize("d", [1, 2, 3, 7, 10, 49])
def test_1_stable_rank_of_the_identity(d: int) -> None:
    assert stable_rank(torch.eye(d, dtype=torch.float64)) == d
    assert stable_rank(torch.eye(d)) == d


def test_1_stable_rank_of_others() -> None:
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))) == 1  # ⌊6 / 4⌋
    assert stable_rank(with_spectrum(2, M, N, [2.0, 2.0, 2.0, 1.0])) == 3  # ⌊13 / 4⌋
    for seed in range(10):
        assert stable_rank(normal(seed, M, 1) @ normal(50 + seed, 1, N)) == 1
        W = normal(seed, M, 4) @ normal(50 + seed, 4, N)
        d = torch.linalg.svdvals(W)
        found = stable_rank(W)
        assert isinstance(found, int) and found == int(d.square().sum() / d[0] ** 2)
        assert 1 <= found <= 4


def test_2_the_first_target_is_the_full_rank() -> None:
    for full in range(1, 130):
        assert {target_rank(full, start, start, "scaled") for start in range(1, full + 1)} == {full}


def test_2_the_scaled_rule() -> None:
    """min(full, ⌈full · sr / sr₀⌉), the quotient exact: 49 / 49 · 1 is 1 for a ceiling too."""
    for full in (1, 5, 49, 64, 100):
        for start in range(1, full + 1):
            for now in range(1, full + 1):
                found = target_rank(full, start, now, "scaled")
                assert isinstance(found, int) and found == min(full, -(-full * now // start))
    assert target_rank(64, 8, 3, "plain") == 3


def watched(values, **arguments) -> list[bool]:
    watch = Watch(**{"window": 15, "threshold": 0.1, **arguments})
    return [bool(watch.add(value)) for value in values]


def test_3_a_constant_is_stable_at_the_first_admissible_epoch() -> None:
    assert watched([7.0] * 20) == [False] * 15 + [True] * 5


@pytest.mark.parametrize("slope", [1.0, -1.0, 0.4])
def test_3_a_steady_change_is_never_stable(slope: float) -> None:
    assert not any(watched([100 + slope * t for t in range(80)]))


def test_3_slow_changes_and_settled_ones_are_stable() -> None:
    assert watched([100 + 0.02 * t for t in range(80)])[15:] == [True] * 65
    jump = watched([10.0] * 5 + [50.0] * 95)
    assert not any(jump[:25]) and all(jump[70:])
    assert watched([100 + 0.4 * t for t in range(80)], threshold=1.0)[15]


def test_3_differences_are_central() -> None:
    """A value that alternates has forward differences of 0.27 in the average, which central ones do not see."""
    assert watched([20 + 2.0 * (-1) ** t for t in range(80)])[-1]


def test_3_training_switches_then() -> None:
    begun = begin(normal(0, M, N), rule="plain")
    for done in range(1, 20):
        train(begun, lambda: begun[0](normal(1, 3, N)).square().sum())
        if done <= 14:
            assert set(roles(begun[1])) == {"weight"}
        if done >= 16:
            assert set(roles(begun[1])) == {"B", "A"}


def test_3_epochs_are_intervals() -> None:
    begun = begin(normal(0, M, N), interval=3, rule="plain")
    for done in range(1, 50):
        train(begun, lambda: begun[0](normal(1, 3, N)).square().sum())
        if done < 45:
            assert set(roles(begun[1])) == {"weight"}
    assert set(roles(begun[1])) == {"B", "A"}


def test_3_all_layers_have_to_rest() -> None:
    """One layer stands still, the other's stable rank is moved from outside: none switches until both rest."""
    model = layer_model(normal(0, 40, 40), after=normal(1, 40, 40))
    handle = rw.adapt_(model, rw.compose(rw.catalog.cuttlefish(interval=1, rule="plain"), "sgd"))
    optimizer = handle.optimizer(0.0)
    bases = orthonormal(2, 40, 40), orthonormal(3, 40, 40)
    for step in range(80):
        if step < 30:
            assert set(handle.parameterization(SITE).roles()) == {"weight"}
            values = torch.full((40,), 1e-3, dtype=torch.float64)
            values[: step // 2 + 1] = 1.0  # the stable rank
            with torch.no_grad():
                handle.parameterization("after").roles()["weight"].copy_((bases[0] * values) @ bases[1].T)
        handle.backward(lambda: model(normal(4, 3, 40)).square().sum())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    for site in (SITE, "after"):
        assert set(handle.parameterization(site).roles()) == {"B", "A"}


@pytest.mark.parametrize("strength", [1e-4, 0.3])
def test_4_frobenius_decay_is_the_gradient_of_the_product(strength: float) -> None:
    B, A = normal(5, M, 3).requires_grad_(), normal(6, 3, N).requires_grad_()
    expected = torch.autograd.grad(strength / 2 * (B @ A).square().sum(), [B, A])
    found = frobenius_gradient(B.detach(), A.detach(), strength)
    for value, grad in zip(found, expected, strict=True):
        assert relative(value, grad) < 1e-12
    W = (B @ A).detach()  # weight decay on W, pulled back
    assert relative(found[0], strength * W @ A.detach().T) < 1e-12
    assert relative(found[1], strength * B.detach().T @ W) < 1e-12


def test_4_after_the_switch_it_joins_the_gradients() -> None:
    begun = switched(with_spectrum(7, M, N, [3.0, 2.0, 1.0, 0.5]), rule="plain", frobenius_decay=0.3)
    model, handle, _ = begun
    B, A = (roles(handle)[role].detach().clone() for role in ("B", "A"))
    x, y = normal(8, 5, N), normal(9, 5, M)
    handle.backward(lambda: (model(x) - y).square().sum())
    G = 2 * (x @ (B @ A).T - y).T @ x
    decay = 0.3 * B @ A
    for role, expected in {"B": (G + decay) @ A.T, "A": B.T @ (G + decay)}.items():
        found = roles(handle)[role].grad
        assert found is not None and relative(found, expected) < 1e-10


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_5_at_full_rank_the_switch_changes_nothing(shape: tuple[int, int]) -> None:
    weight, x = normal(0, *shape), normal(10, 4, shape[1])
    begun = begin(weight)
    train(begun, lambda: begun[0](x).square().sum(), 17)  # unmoved, so the scaled rule asks for the full rank
    assert relative(begun[0](x), x @ weight.T) < 1e-10


@pytest.mark.parametrize(
    ("values", "rank"), [([3.0, 3.0, 2.0, 1.0, 0.5, 0.1], 2), ([2.0, 1.0, 0.5, 0.2], 1), ([1.0] * 4 + [0.5], 4)]
)
def test_5_the_switch_drops_the_tail(values: list[float], rank: int) -> None:
    weight, x = with_spectrum(7, M, N, values), normal(10, 4, N)
    begun = switched(weight, rule="plain")
    B, A = (roles(begun[1])[role].detach() for role in ("B", "A"))
    assert B.shape == (M, rank) and A.shape == (rank, N)
    tail = sum(s**2 for s in values[rank:])
    assert float((weight - B @ A).square().sum()) == pytest.approx(tail, rel=1e-9)
    assert relative(B.T @ B, A @ A.T) < 1e-10  # √S on either side
    assert relative(begun[0](x), x @ (B @ A).T) < 1e-12
    assert relative(weight + begun[1].update_of(SITE).dense(), B @ A) < 1e-12
    if values[rank - 1] > values[rank]:
        assert relative(B @ A, truncated(weight, rank)) < 1e-10


def test_5_the_optimizer_goes_on_with_the_factors() -> None:
    lr = 0.05
    begun = switched(with_spectrum(7, M, N, [3.0, 2.0, 1.0, 0.5]), rule="plain", frobenius_decay=0.0)
    model, handle, optimizer = begun
    B, A = (roles(handle)[role].detach().clone() for role in ("B", "A"))
    for group in optimizer.param_groups:
        group["lr"] = lr
    x, y = normal(8, 5, N), normal(9, 5, M)
    for _ in range(4):
        G = 2 * (x @ (B @ A).T - y).T @ x / 100
        B, A = B - lr * G @ A.T, A - lr * B.T @ G
        train(begun, lambda: (model(x) - y).square().sum() / 100)
        assert relative(roles(handle)["B"], B) < 1e-10 and relative(roles(handle)["A"], A) < 1e-10


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, -1.0, 3.7, 1e4])
def test_6_stable_rank_does_not_depend_on_the_scale(scale: float) -> None:
    for seed in range(10):
        W = normal(seed, M, N)
        assert stable_rank(scale * W) == stable_rank(W)
    for d in (3, 7, 10):
        assert stable_rank(scale * torch.eye(d, dtype=torch.float64)) == d
