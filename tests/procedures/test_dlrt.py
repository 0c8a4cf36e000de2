"""DLRT: its gradients on every kind of layer, the integrator's step against dense linear algebra, ranks, moments, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.core.protocols import Renew
from rankwise.core.stored import read_stored
from rankwise.parameterizations.integrator import fewest
from tests.procedures.quadratic import Quadratic, assert_orthonormal, drawn, of_rank, train

LAYERS = {
    "linear": (lambda: nn.Linear(7, 9), (5, 7)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (2, 8, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 4, padding=2), (2, 3, 11)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("keep_base", [True, False])
def test_gradients_are_the_bare_ones_whatever_the_core(kind: str, keep_base: bool) -> None:
    """G V, Gᵀ U and Uᵀ G V with G the gradient of a dense layer with the same weight, also where S is zero or singular."""
    make, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = make().double()
    model, x = nn.Sequential(layer), drawn(1, *shape)
    handle = rankwise.adapt_(model, rankwise.compose(f"dlrt(rank=3, keep_base={keep_base})"), where=["0"])
    entry = handle.parameterization("0")
    for core in (torch.diag(torch.tensor([2.0, 1e-9, 0.0])).double(), drawn(2, 3, 3), torch.zeros(3, 3).double()):
        with torch.no_grad():
            entry.S[:3, :3] = core
            weight = handle.update_of("0").dense() + layer.weight.flatten(1)
        dense = make().double()
        dense.load_state_dict({"weight": weight.view_as(layer.weight), "bias": layer.bias})
        y, expected = model(x), dense(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        g_y = drawn(3, *y.shape)
        y.backward(g_y)
        expected.backward(g_y)
        G = dense.weight.grad.flatten(1)
        U, _, V = (tensor.detach() for tensor in entry.factors())
        for tensor, value in ((entry.U, G @ V), (entry.V, G.T @ U), (entry.S, U.T @ G @ V)):
            torch.testing.assert_close(tensor.grad[: len(value), :3], value, rtol=1e-10, atol=1e-10)
            assert not tensor.grad[:, 3:].any()
        model.zero_grad()


def test_one_step_lands_on_a_target_of_the_same_rank() -> None:
    target = of_rank(0, 12, 9, 3)
    problem = Quadratic("dlrt(rank=3, tolerance=1e-9, start='random')", target)
    problem.step()
    assert problem.entry.active == 3
    assert float((problem.matrix() - target).norm() / target.norm()) < 1e-13


def test_the_rank_grows_to_the_targets() -> None:
    target = of_rank(4, 12, 9, 4)
    problem = Quadratic("dlrt(rank=3, tolerance=1e-10, start='random', max_rank=4)", target)
    errors, ranks = [], []
    for _ in range(4):
        problem.step()
        ranks.append(problem.entry.active)
        errors.append(float((problem.matrix() - target).norm() / target.norm()))
    assert ranks == [4, 4, 4, 4] and errors[0] > 1e-3 and errors[-1] < 1e-13


@pytest.mark.parametrize("size", [(12, 9), (5, 4)])
def test_a_step_projects_the_gradient_on_both_bases(size: tuple[int, int]) -> None:
    """Before the cut W₁ = W - η P_U G P_V; the wider bases leave W as it was; where they are whole it is gradient descent."""
    problem = Quadratic("dlrt(rank=3, tolerance=0.3)", drawn(0, *size), lr=0.2)
    W, G = problem.matrix(), problem.matrix() - problem.target
    problem.handle.backward(problem.loss)
    torch.testing.assert_close(problem.matrix(), W, rtol=0, atol=1e-13)
    U, S, V = (tensor.detach().clone() for tensor in problem.entry.factors())
    assert problem.entry.active == 6 == S.shape[0]
    assert_orthonormal(U[:, : min(size[0], 6)])
    assert_orthonormal(V[:, : min(size[1], 6)])
    assert problem.entry.U.grad is None and problem.entry.V.grad is None
    problem.optimizer.step()
    expected = W - 0.2 * U @ U.T @ G @ V @ V.T
    torch.testing.assert_close(problem.matrix(), expected, rtol=0, atol=1e-12)
    if size == (5, 4):
        torch.testing.assert_close(expected, W - 0.2 * G, rtol=0, atol=1e-12)
    problem.handle.after_step()
    singular = torch.linalg.svdvals(expected)
    assert float((problem.matrix() - expected).norm()) <= 0.3 * float(singular.norm())
    best = singular[problem.entry.active :].norm()
    torch.testing.assert_close((problem.matrix() - expected).norm(), best, rtol=1e-9, atol=1e-12)
    U, S, V = (tensor.detach() for tensor in problem.entry.factors())
    assert_orthonormal(U)
    assert_orthonormal(V)
    torch.testing.assert_close(S, torch.diag(S.diagonal()))
    width = problem.entry.active
    assert not problem.entry.U[:, width:].any() and not problem.entry.S[width:].any() and not problem.entry.S[:, width:].any()


def test_small_singular_values_do_no_harm() -> None:
    """With S scaled by 1e-8 the step is as good; descent on B A from the same point stands still."""
    target = of_rank(2, 12, 9, 3)
    problem = Quadratic("dlrt(rank=3, tolerance=1e-9, start='random')", target)
    with torch.no_grad():
        problem.entry.S.mul_(1e-8)
    problem.step()
    assert float((problem.matrix() - target).norm() / target.norm()) < 1e-12


def test_at_a_fixed_rank_it_is_the_unconventional_integrator() -> None:
    problem = Quadratic("dlrt(rank=3, adaptive=False)", drawn(0, 8, 7), lr=0.1)
    U, S, V = (tensor.detach().clone() for tensor in problem.entry.factors())
    G = U @ S @ V.T - problem.target
    U_new = torch.linalg.qr(U @ S - 0.1 * G @ V)[0]
    V_new = torch.linalg.qr(V @ S.T - 0.1 * G.T @ U)[0]
    core = U_new.T @ U @ S @ V.T @ V_new
    core = core - 0.1 * U_new.T @ (U_new @ core @ V_new.T - problem.target) @ V_new
    problem.step()
    torch.testing.assert_close(problem.matrix(), U_new @ core @ V_new.T, rtol=1e-12, atol=1e-12)
    assert problem.entry.U.shape == (8, 3) and problem.entry.active == 3


@pytest.mark.parametrize("kind", ["strided", "linear"])
def test_a_convolution_trains_as_its_matrix(kind: str) -> None:
    """Three steps on a real layer, against DLRT written for a dense gradient."""
    make, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, dense = make().double(), make().double()
    dense.load_state_dict(layer.state_dict())
    x, y = drawn(1, *shape), drawn(2, *layer(drawn(1, *shape)).shape)
    W = layer.weight.detach().flatten(1)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, V, rate = U[:, :2], torch.diag(s[:2]), Vh[:2].T, 0.3

    def gradient(W: Tensor) -> Tensor:
        with torch.no_grad():
            dense.weight.copy_(W.view_as(dense.weight))
        dense.zero_grad()
        (dense(x) - y).square().mean().backward()
        return dense.weight.grad.flatten(1).clone()

    model = nn.Sequential(layer)
    handle = rankwise.adapt_(model, rankwise.compose("dlrt(rank=2, tolerance=0.15)"), where=["0"])
    optimizer = handle.optimizer(lr=rate)
    for _ in range(3):
        G = gradient(U @ S @ V.T)
        K, L = U @ S - rate * G @ V, V @ S.T - rate * G.T @ U
        U1, V1 = torch.linalg.qr(torch.cat([K, U], 1))[0], torch.linalg.qr(torch.cat([L, V], 1))[0]
        core = U1.T @ U @ S @ V.T @ V1
        core = core - rate * U1.T @ gradient(U1 @ core @ V1.T) @ V1
        P, d, Qh = torch.linalg.svd(core)
        r = next(j for j in range(len(d) + 1) if d[j:].norm() < 0.15 * d.norm())
        r = min(max(r, 2), min(W.shape) // 2)
        U, S, V = U1 @ P[:, :r], torch.diag(d[:r]), V1 @ Qh[:r].T
        handle.backward(lambda: (model(x) - y).square().mean())
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        assert handle.parameterization("0").active == r
        torch.testing.assert_close(handle.update_of("0").dense() + W, U @ S @ V.T, rtol=1e-9, atol=1e-11)


def test_a_step_takes_two_forward_backwards() -> None:
    problem, forwards, backwards = Quadratic("dlrt(rank=2)", drawn(0, 8, 7)), [], []
    problem.model.register_forward_hook(lambda *_: forwards.append(1))
    problem.model.register_full_backward_hook(lambda *_: backwards.append(1))

    def loss() -> Tensor:
        x = torch.eye(7, dtype=torch.float64, requires_grad=True)
        return (problem.model(x).T - problem.target).square().sum()

    problem.handle.backward(loss)
    assert len(forwards) == len(backwards) == 2


def test_moments_of_the_core_follow_the_bases() -> None:
    """The first moment is a matrix in the bases: U m Vᵀ stays; squares never become negative."""
    problem = Quadratic("dlrt(rank=3, tolerance=0.02) + adamw", drawn(0, 10, 8), lr=0.05)
    for _ in range(3):
        problem.step()
    entry, state = problem.entry, problem.optimizer.state[problem.entry.S]
    assert set(state) == {"adamw.step", "adamw.exp_avg", "adamw.exp_avg_sq"}
    r = entry.active
    m = state["adamw.exp_avg"]
    assert not m[r:].any() and not m[:, r:].any()
    before = (entry.U @ m @ entry.V.T).detach()
    problem.model.eval()  # not a forward of a training step
    problem.loss().backward()
    problem.model.train()
    problem.handle.apply_({"0": Renew("augment", {"learning_rate": 0.05})})
    m = problem.optimizer.state[entry.S]["adamw.exp_avg"]
    assert entry.active > r
    torch.testing.assert_close(entry.U @ m @ entry.V.T, before, rtol=0, atol=1e-13)
    assert float(problem.optimizer.state[entry.S]["adamw.exp_avg_sq"].min()) >= 0
    problem.handle.apply_({"0": Renew("truncate", {"tolerance": 0.02, "absolute": False, "min_rank": 2})})
    problem.optimizer.zero_grad()
    losses = [problem.step() for _ in range(60)]
    assert all(torch.isfinite(value).all() for value in problem.optimizer.state[entry.S].values())
    assert losses[-1] < 0.7 * losses[0]


def test_bases_freeze_when_asked_to() -> None:
    problem, forwards = Quadratic("dlrt(rank=3, frozen_bases_after=2)", drawn(0, 8, 7), lr=0.1), []
    problem.model.register_forward_hook(lambda *_: forwards.append(1))
    problem.step()
    problem.step()
    U = problem.entry.U.detach().clone()
    assert sorted(problem.handle.blocks()["0"]) == ["S"] and len(forwards) == 4
    losses = [problem.step() for _ in range(5)]
    assert torch.equal(problem.entry.U, U) and len(forwards) == 9 and losses[-1] < losses[0]


def test_beside_a_weight_it_starts_at_it_and_is_exact_to_export(tmp_path: Path) -> None:
    problem = Quadratic("dlrt(rank=2, tolerance=0.01, keep_base=True)", drawn(0, 8, 7), lr=0.3)
    base = problem.model[0].weight.detach()
    torch.testing.assert_close(problem.matrix(), base, rtol=0, atol=1e-15)
    for _ in range(3):
        problem.step()
    pair = problem.handle.low_rank_of("0")
    assert pair is not None and pair.rank == problem.entry.active
    torch.testing.assert_close(pair.dense() + base, problem.matrix(), rtol=1e-12, atol=1e-12)
    stored = read_stored(problem.handle.save(tmp_path / "a")).update("0")  # without the model, at the present rank
    torch.testing.assert_close(stored.dense(), pair.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "tolerance", "absolute", "expected"),
    [
        ((4.0, 3.0, 0.0), 0.0, False, 2),
        ((4.0, 3.0, 0.4), 0.1, False, 2),
        ((4.0, 3.0, 0.6), 0.1, False, 3),
        ((4.0, 3.0, 0.6), 0.7, True, 2),
        ((4.0, 3.0, 0.6), 10.0, True, 1),
        ((0.0, 0.0, 0.0), 0.1, False, 1),
    ],
)
def test_how_many_are_kept(values: tuple[float, ...], tolerance: float, absolute: bool, expected: int) -> None:
    d = torch.tensor(values, dtype=torch.float64)
    assert fewest(d, tolerance, absolute=absolute, least=1, most=3) == expected
    assert fewest(d, tolerance, absolute=absolute, least=2, most=2) == 2


def test_a_layer_without_a_gradient_waits() -> None:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)]).double()
    handle = rankwise.adapt_(model, rankwise.compose("dlrt(rank=2)"), where=["0", "1"])
    before = handle.update_of("1").dense().detach()
    train(handle, lambda: model[0](drawn(0, 4, 6)).square().mean(), 3, 0.1)
    torch.testing.assert_close(handle.update_of("1").dense(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text",
    ["dlrt(rank=4, max_rank=3)", "dlrt(tolerance=1.0)", "dlrt(tolerance=-0.1)", "dlrt(min_rank=0)", "dlrt(start='zero')"],
)
def test_refusals(text: str) -> None:
    with pytest.raises(ArgumentError):
        Quadratic(text, drawn(0, 20, 18))


def test_it_needs_the_batch_again_and_its_own_layer() -> None:
    problem = Quadratic("dlrt(rank=2)", drawn(0, 8, 7))
    problem.loss().backward()
    with pytest.raises(TrainingError, match=r"handle\.backward"):
        problem.handle.after_backward()
    with pytest.raises(RecipeError, match="both dlrt"):
        rankwise.compose("dlrt + relora")
    with pytest.raises(RecipeError, match="in its own way"):
        rankwise.adapt_(nn.Sequential(nn.Linear(8, 8)), rankwise.compose("dlrt(rank=2) + sam"))
