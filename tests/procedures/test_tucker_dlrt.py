"""Tucker DLRT: the chain of convolutions, gradients of all K_i from one backward, augmentation, cuts, and DLRT as two modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.parameterizations.tucker_factored import consistent, unfolded
from tests.procedures.quadratic import Quadratic, assert_orthonormal, drawn, of_rank


def conv(text: str, **options: object) -> tuple[nn.Sequential, rankwise.Handle, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(8, 10, 3, **options).double()  # type: ignore[arg-type]
    model = nn.Sequential(layer)
    return model, rankwise.adapt_(model, rankwise.compose(text), where=["0"]), drawn(1, 2, 8, 9, 7)


@pytest.mark.parametrize("modes", [(0, 1), (1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "padding": 2}], ids=str)
def test_it_is_the_convolution_with_its_kernel_and_gives_the_gradients_of_all_K(options: dict, modes: tuple) -> None:
    model, handle, x = conv(f"tucker_dlrt(ranks=2, modes={modes})", **options)
    entry, layer = handle.parameterization("0"), model[0]
    with torch.no_grad():
        entry.core.copy_(drawn(2, *entry.core.shape))
        entry.core.mul_(1e-6 ** torch.arange(len(entry.core))[:, None, None, None])  # small values of the core do no harm
    dense = nn.Conv2d(8, 10, 3, **options).double()
    dense.load_state_dict({"weight": entry.kernel().detach(), "bias": layer.bias})
    y, expected = model(x), dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g_y = drawn(3, *y.shape)
    y.backward(g_y)
    expected.backward(g_y)
    G = dense.weight.grad
    core, bases = (entry.factors()[0].detach(), [U.detach() for U in entry.factors()[1]])
    full = [bases[modes.index(k)] if k in modes else torch.eye(G.shape[k], dtype=G.dtype) for k in range(4)]
    for index, mode in enumerate(modes):
        Q, _ = torch.linalg.qr(unfolded(core, mode).T)  # Mat_i(C)ᵀ = Q Sᵀ
        others = [U for k, U in enumerate(full) if k != mode]
        kron = torch.kron(torch.kron(others[0], others[1]), others[2])
        expected_K = unfolded(G, mode) @ kron @ Q
        found = entry.get_parameter(f"U_{mode}").grad[:, : bases[index].shape[1]]
        torch.testing.assert_close(found, expected_K, rtol=1e-9, atol=1e-10)
    g_C = torch.einsum("abcd,ai,bj,ck,dl->ijkl", G, *full)
    torch.testing.assert_close(entry.core.grad[tuple(map(slice, core.shape))], g_C, rtol=1e-10, atol=1e-10)


def test_a_step_on_a_real_convolution() -> None:
    """Augmenting leaves the kernel; bases stay orthonormal; the cut's error is within its bounds; ranks are consistent."""
    model, handle, x = conv("tucker_dlrt(ranks=3, tolerance=0.25, min_rank=1)", padding=1)
    entry, optimizer, y = handle.parameterization("0"), handle.optimizer(lr=0.5), drawn(4, 2, 10, 9, 7)
    losses = []
    for _ in range(5):
        before = entry.kernel().detach()
        losses.append(float(handle.backward(lambda: (model(x) - y).square().mean())))
        torch.testing.assert_close(entry.kernel(), before, rtol=0, atol=1e-13)
        optimizer.step()
        moved, core = entry.kernel().detach(), entry.factors()[0].detach().clone()
        handle.after_step()
        optimizer.zero_grad()
        cut = [torch.linalg.svdvals(unfolded(core, mode))[rank:].square().sum() for mode, rank in enumerate(entry.active)]
        error = (entry.kernel() - moved).norm().square()
        assert float(max(cut)) - 1e-12 <= float(error) <= float(sum(cut)) + 1e-12
        assert float(error.sqrt()) <= 2**0.5 * 0.25 * float(core.norm())
        for U in entry.factors()[1]:
            assert_orthonormal(U.detach())
    assert losses[-1] < losses[0]


def test_on_a_linear_layer_it_is_dlrt() -> None:
    target = drawn(0, 12, 9)
    matrix = Quadratic("dlrt(rank=3, tolerance=0.15)", target, lr=0.2)
    tucker = Quadratic("tucker_dlrt(ranks=3, tolerance=0.15, min_rank=2, max_rank=4)", target, lr=0.2)
    for _ in range(6):
        assert matrix.step() == pytest.approx(tucker.step(), rel=1e-11)
        assert tucker.entry.active == (matrix.entry.active,) * 2
        torch.testing.assert_close(matrix.matrix(), tucker.matrix(), rtol=0, atol=1e-11)


def test_one_step_lands_on_a_kernel_of_the_same_ranks() -> None:
    """The input is every unit kernel window in turn: y holds the kernel, and the loss is ½‖W' - T‖²."""
    model = nn.Sequential(nn.Conv1d(6, 8, 3, bias=False)).double()
    target = torch.einsum("ijk,ai,bj->abk", drawn(0, 3, 2, 3), drawn(1, 8, 3), drawn(2, 6, 2))
    handle = rankwise.adapt_(model, rankwise.compose("tucker_dlrt(ranks=(3, 2), tolerance=1e-9, min_rank=1)"), where=["0"])
    x, optimizer = torch.eye(18, dtype=torch.float64).reshape(18, 6, 3), handle.optimizer(lr=1.0)
    handle.backward(lambda: 0.5 * (model(x)[..., 0].T.reshape(8, 6, 3) - target).square().sum())
    optimizer.step()
    handle.after_step()
    entry = handle.parameterization("0")
    assert entry.active == (3, 2)
    assert float((entry.kernel() - target).norm() / target.norm()) < 1e-12


def test_moments_follow_the_bases() -> None:
    problem = Quadratic("tucker_dlrt(ranks=3, tolerance=0.05) + adamw", of_rank(0, 12, 9, 4), lr=0.1)
    losses = [problem.step() for _ in range(80)]
    state = problem.optimizer.state[problem.entry.core]
    assert float(state["adamw.exp_avg_sq"].min()) >= 0 and losses[-1] < 0.1 * losses[0]


def test_ranks_that_an_unfolding_cannot_have_are_lowered() -> None:
    assert consistent([8, 2, 3], (0, 1, 2)) == [6, 2, 3]
    assert consistent([8, 1, 3, 3], (0, 1)) == [8, 1, 3, 3]
    assert consistent([5, 3], (0, 1)) == [3, 3]
    _, handle, _ = conv("tucker_dlrt(ranks=(10, 1))")
    assert handle.parameterization("0").active == (9, 1)


def test_defaults_are_half_of_every_mode() -> None:
    _, handle, _ = conv("tucker_dlrt")
    entry = handle.parameterization("0")
    assert entry.active == (5, 4) and entry.core.shape == (10, 8, 3, 3)
    assert [tuple(U.shape) for U in entry.factors()[1]] == [(10, 5), (8, 4)]


@pytest.mark.parametrize("text", ["tucker_dlrt(ranks=(1, 2, 3))", "tucker_dlrt(modes=(2, 3))", "tucker_dlrt(ranks=0)"])
def test_refusals(text: str) -> None:
    with pytest.raises(ArgumentError):
        conv(text)
