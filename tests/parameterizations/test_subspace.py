"""Intrinsic dimension: the projections, one transform per forward, and the graphs that share it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.core.errors import ArgumentError, CheckpointError
from rankwise.parameterizations import subspace
from rankwise.parameterizations.intrinsic import PROJECTIONS, Fastfood, walsh_hadamard
from tests.contract.subjects import scatter

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8)).double()


def adapted(text: str = "intrinsic_dimension(dimension=6)", **options) -> tuple[nn.Sequential, rankwise.Handle]:
    model = mlp()
    handle = rankwise.adapt_(model, rankwise.compose(text), **options)
    scatter(handle)
    return model, handle


@pytest.mark.parametrize("length", [1, 2, 32, 64, 256])
def test_the_transform_is_sylvesters_matrix(length: int) -> None:
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < length:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ H, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), length * x, rtol=1e-12, atol=1e-11)
    with pytest.raises(ArgumentError, match="power of two"):
        walsh_hadamard(x[:, :1].expand(3, 3))


@pytest.mark.parametrize("kind", PROJECTIONS.values())
@pytest.mark.parametrize("size", [64, 200])
def test_columns_have_norm_one_and_the_adjoint_is_the_transpose(kind, size: int) -> None:
    projection = kind(size, 20, 1)
    eye = torch.eye(20, dtype=torch.float64)
    P = torch.stack([projection.project(e) for e in eye], dim=1)  # (D, 20)
    if kind is Fastfood and size == 200:
        assert float(P.square().sum(0).mean()) == pytest.approx(1, abs=0.1)
    else:
        torch.testing.assert_close(P.norm(dim=0), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)
    back = torch.stack([projection.adjoint(e) for e in torch.eye(size, dtype=torch.float64)])  # (D, 20)
    torch.testing.assert_close(back, P, rtol=0, atol=1e-12)
    assert torch.equal(kind(size, 20, 1).project(eye[0]), P[:, 0]) and not torch.equal(
        kind(size, 20, 2).project(eye[0]), P[:, 0]
    )
    with pytest.raises(ArgumentError, match=f"1 to {kind.largest(size)} for {size} numbers"):
        kind(size, 1000)


@pytest.mark.parametrize("size", [2**19, 2**19 - 70_000])
def test_long_vectors_are_made_in_pieces_and_give_the_same(size: int) -> None:
    projection = Fastfood(size, 100, 1)
    v = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = projection.project(v.clone().requires_grad_())  # recorded, so in one go
    back = projection.adjoint(g.clone().requires_grad_())
    assert projection._in_pieces(v) and whole.requires_grad
    torch.testing.assert_close(projection.project(v), whole.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(projection.adjoint(g), back.detach(), rtol=0, atol=1e-10)


def count_projections(monkeypatch) -> list[int]:
    calls: list[int] = []
    real = Fastfood.project
    monkeypatch.setattr(Fastfood, "project", lambda self, v: calls.append(1) or real(self, v))
    return calls


def test_the_transform_runs_once_per_forward_and_never_serves_an_old_vector(monkeypatch) -> None:
    calls = count_projections(monkeypatch)
    model, handle = adapted()
    for _ in range(2):
        calls.clear()
        y = model(X)
        assert len(calls) == 1
        y.sum().backward()
    with torch.no_grad():
        before = model(X)
        v = handle.bank["v"]
        assert isinstance(v, nn.Parameter)
        v.mul_(2)
        delta = handle.update_of("0").dense()  # between forwards
        assert not torch.equal(model(X), before)
        torch.testing.assert_close(delta, handle.update_of("0").dense())
        v.data.mul_(2)  # past the counters: the next forward sees it
        moved = model(X)
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(fresh(X), moved, rtol=0, atol=0)


@pytest.mark.parametrize("gains", [False, True])
def test_gradients_are_those_of_autograd_under_every_way_to_run_it(gains: bool) -> None:
    model, _ = adapted(f"intrinsic_dimension(dimension=6, gains={gains})")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = rankwise.effective_weights(model)
    plain = torch.autograd.grad(rankwise.functional_call(model, weights, X).square().sum(), list(named.values()))

    def check(found) -> None:
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def grads() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in named.values()]  # type: ignore[union-attr]
        model.zero_grad()
        return found

    model(X).square().sum().backward()
    check(grads())
    for reentrant in (False, True):  # two regions that share one P v
        half = checkpoint(model[:2], X.clone().requires_grad_(), use_reentrant=reentrant)
        checkpoint(model[2:], half, use_reentrant=reentrant).square().sum().backward()  # type: ignore[union-attr]
        check(grads())
    y = model(X)  # two losses over one forward, one after the other
    y[:2].square().sum().backward(retain_graph=True)
    y[2:].square().sum().backward()
    check(grads())
    first, second = model(X[:2]), model(X[2:])  # accumulated: two forwards, then two backwards
    first.square().sum().backward()
    second.square().sum().backward()
    check(grads())
    values = {name: p.detach() for name, p in named.items()}
    found = torch.func.grad(lambda v: torch.func.functional_call(model, v, (X,)).square().sum())(values)
    check([found[name] for name in named])


def test_columns_are_normalized_over_the_model_or_per_tensor() -> None:
    for scope, norm in (("model", 1.0), ("tensor", 3**0.5)):
        _, handle = adapted(f"intrinsic_dimension(dimension=6, projection='dense', scope='{scope}')")
        with torch.no_grad():
            handle.bank["v"].zero_()
            handle.bank["v"][2] = 1.0
            moved = torch.cat([update.dense().flatten() for update in handle.updates().values()])
        assert float(moved.norm()) == pytest.approx(norm, abs=1e-12)


def test_the_file_holds_v_and_the_order_of_the_layers_is_checked(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, handle = adapted()
    (file,) = handle.save(tmp_path).glob("*.safetensors")
    assert {key: tuple(t.shape) for key, t in load_file(file).items()} == {"rankwise_banks.v": (6,)}
    fresh = mlp()
    rankwise.load_(fresh, tmp_path)
    assert torch.equal(fresh(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))
    description = json.loads((tmp_path / "adapter.json").read_text())
    description["bank"]["digest"] = "0" * 32
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="same layers"):
        rankwise.load_(mlp(), tmp_path)


def test_a_whole_space_step_is_a_step_of_the_weights() -> None:
    """d = D with orthonormal columns (D a power of two, dense P made orthogonal): SGD in v is SGD in W."""
    torch.manual_seed(0)
    ours, plain = nn.Sequential(nn.Linear(4, 4, bias=False)).double(), nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    plain.load_state_dict(ours.state_dict())
    handle = rankwise.adapt_(ours, rankwise.compose("intrinsic_dimension(dimension=16, projection='dense') + sgd"))
    bank = handle.bank
    with torch.no_grad():
        bank["matrix_0"].copy_(torch.linalg.qr(bank["matrix_0"])[0])
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    optimizer = handle.optimizer(lr=0.1, momentum=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        ours(x).square().sum().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        (gradient,) = torch.autograd.grad(plain(x).square().sum(), [plain[0].weight])
        with torch.no_grad():
            plain[0].weight -= 0.1 * gradient
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)


def test_half_precision_and_autocast_project_in_full() -> None:
    model, handle = adapted("intrinsic_dimension(dimension=6)")
    exact = handle.update_of("0").dense()
    model.to(torch.bfloat16)
    vector = handle.parameterization("0").projected()[0]
    assert vector.dtype is torch.float32
    torch.testing.assert_close(vector.view(12, 8).double(), exact, rtol=0.05, atol=0.05)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert handle.parameterization("0").projected()[0].dtype is torch.float32


def test_unknown_scopes_and_projections_are_named() -> None:
    for text, match in (("scope='layer'", "scope is model or tensor"), ("projection='fft'", "fastfood, dense, sparse")):
        with pytest.raises(ArgumentError, match=match):
            adapted(f"intrinsic_dimension(dimension=6, {text})")
    assert subspace.PROJECTIONS is PROJECTIONS
