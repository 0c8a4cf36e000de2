"""DoRA: the kept plan is never stale, inner methods are checked, dropout and magnitudes alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.parameterizations.magnitude import Magnitude
from tests.contract.subjects import scatter

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(6, 8)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layers


def adapted(text: str = "dora(rank=2)") -> tuple[nn.Sequential, rankwise.Handle, Magnitude]:
    layers = model()
    handle = rankwise.adapt_(layers, rankwise.compose(text), where=["0"])
    scatter(handle)
    entry = handle.parameterization("0")
    assert isinstance(entry, Magnitude)
    return layers, handle, entry


def dense(layers: nn.Sequential, handle: rankwise.Handle) -> Tensor:
    """What the layer should give, from dense matrices and without any plan."""
    entry = handle.parameterization("0")
    V = layers[0].weight + entry.inner.update().dense()
    return X @ (entry.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)).t() + layers[0].bias


CHANGES: dict[str, Callable[[nn.Sequential, Magnitude], object]] = {
    "B": lambda layers, entry: entry.inner.B.mul_(2.0),
    "A, one entry": lambda layers, entry: entry.inner.A[0, 0].add_(1.0),
    "magnitude": lambda layers, entry: entry.magnitude.neg_(),
    "base weight": lambda layers, entry: layers[0].weight.add_(1.0),
    "replaced storage": lambda layers, entry: setattr(entry.inner.B, "data", entry.inner.B + 1.0),
    "load_state_dict": lambda layers, entry: entry.load_state_dict({k: v * 3.0 for k, v in entry.state_dict().items()}),
    "load by assignment": lambda layers, entry: entry.load_state_dict(
        {k: v * 3.0 for k, v in entry.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_plan_follows_every_change(change: str) -> None:
    layers, handle, entry = adapted()
    layers.eval()
    with torch.no_grad():
        before = layers(X)
        CHANGES[change](layers, entry)
        torch.testing.assert_close(layers(X), dense(layers, handle), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(layers(X), before)


def test_the_plan_is_used_and_dropped() -> None:
    layers, _, entry = adapted()
    layers.eval()
    sources = [layers[0].weight, *entry.parameters()]
    with torch.no_grad():
        layers(X)
        kept = entry.plan.find(sources)
        assert kept is not None
        layers(X)
        assert entry.plan.find(sources) is kept, "an unchanged layer uses the same plan"
    layers(X)
    assert entry.plan.find(sources) is None, "a forward with gradients drops it"
    with torch.no_grad():
        layers(X)
    layers.train()
    assert entry.plan.find(sources) is None, "train() drops it"
    layers.eval()
    with torch.no_grad():
        layers(X)
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert other[0].adapter["default"].plan._value is None, "a copy has no plan"
        with torch.no_grad():
            assert torch.equal(other(X), layers(X))
    with torch.inference_mode():
        torch.testing.assert_close(layers(X), dense(*adapted()[:2]), rtol=1e-12, atol=1e-12)


def test_eval_under_gradients_still_trains() -> None:
    layers, _, entry = adapted()
    layers.eval()
    with torch.no_grad():
        layers(X)
    layers(X).square().sum().backward()
    assert entry.magnitude.grad is not None and entry.inner.B.grad is not None


def test_the_plan_follows_the_shared_bank() -> None:
    layers, handle, _ = adapted("dora(inner=vera(rank=3))")
    layers.eval()
    with torch.no_grad():
        layers(X)
        handle.bank["A"].mul_(-2.0)
        torch.testing.assert_close(layers(X), dense(layers, handle), rtol=1e-12, atol=1e-12)


def test_detached_and_full_gradients() -> None:
    for detach in (True, False):
        layers, _, entry = adapted(f"dora(rank=2, detach_norm={detach})")
        layers(X).square().sum().backward()
        W, mu = layers[0].weight, entry.magnitude
        V = W + entry.inner.update().dense()
        norms = V.norm(dim=1, keepdim=True)
        y = X @ (mu[:, None] * V / (norms.detach() if detach else norms)).t() + layers[0].bias
        expected = torch.autograd.grad(y.square().sum(), [entry.inner.B, entry.inner.A, mu])
        for found, wanted in zip((entry.inner.B, entry.inner.A, mu), expected, strict=True):
            torch.testing.assert_close(found.grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("detach", [True, False])
def test_rows_of_zeros_stay_finite(detach: bool) -> None:
    layers = model()
    with torch.no_grad():
        layers[0].weight[2] = 0
    expected = layers(X)
    handle = rankwise.adapt_(layers, rankwise.catalog.dora(rank=2, detach_norm=detach), where=["0"])
    torch.testing.assert_close(layers(X), expected, rtol=1e-12, atol=1e-12)
    layers(X).square().sum().backward()
    for block in handle.blocks().values():
        assert all(torch.isfinite(tensor.grad).all() for tensor in block.values())


def test_a_start_moves_the_magnitude_only_where_it_moves_the_weight() -> None:
    layers = model()
    expected, weight = layers(X), layers[0].weight.clone()
    handle = rankwise.adapt_(layers, rankwise.compose("dora(rank=2)"), where=["0"])
    entry = handle.parameterization("0")
    with torch.no_grad():
        entry.load_factors(rankwise.LowRank(torch.ones(8, 2).double(), torch.ones(2, 6).double()))
        entry.refresh(handle.adapters("0").base(layers[0]))
    torch.testing.assert_close(entry.magnitude, (weight + 2.0).norm(dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layers(X), expected + 2.0 * X.sum(1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_magnitudes_alone() -> None:
    layers = model()
    expected = layers(X)
    handle = rankwise.adapt_(layers, rankwise.compose("dora(direction=False)"), where=["0"])
    assert set(handle.blocks()["0"]) == handle.recipe.roles == {"magnitude"}
    torch.testing.assert_close(layers(X), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        handle.parameterization("0").magnitude.mul_(2.0)
    torch.testing.assert_close(layers(X), 2 * expected - layers[0].bias, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="no effect"):
        rankwise.catalog.dora(direction=False, rank=4)


def test_dropout_thins_what_differs_from_the_base() -> None:
    """y = W x + b + (g - 1) ∘ W x̃ + g ∘ U x̃, and without dropout that is the adapted layer."""
    layers, handle, entry = adapted("dora(rank=2, dropout=0.5)")
    layers.train()
    mask = torch.where(torch.rand(5, 6, generator=torch.Generator().manual_seed(3)) > 0.5, 2.0, 0.0).double()
    entry.thin = lambda x, probability: x * mask
    W, U = layers[0].weight, entry.inner.update().dense()
    gain = entry.magnitude / (W + U).norm(dim=1)
    thinned = X * mask
    expected = X @ W.t() + layers[0].bias + (gain - 1) * (thinned @ W.t()) + gain * (thinned @ U.t())
    torch.testing.assert_close(layers(X), expected, rtol=1e-12, atol=1e-12)
    layers.eval()
    torch.testing.assert_close(layers(X), dense(layers, handle), rtol=1e-12, atol=1e-12)


def test_inner_methods_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match="additive inner method") as caught:
        rankwise.adapt_(model(), rankwise.compose("dora(inner=bone(mode='bat', rank=2))"), where=["0"])
    assert "vera" in str(caught.value), "the remedy names methods that fit"
    embedding = nn.Sequential(nn.Embedding(6, 8))
    with pytest.raises(RecipeError, match="kind conv, linear; this one is of kind embedding"):
        rankwise.adapt_(embedding, rankwise.compose("dora(inner=bone(rank=2))"), where=["0"])
    with pytest.raises(ArgumentError, match=r"dora \+ adamw"):
        rankwise.compose("dora(inner=adamw)")
    with pytest.raises(ArgumentError, match="belong to the inner method"):
        rankwise.adapt_(model(), rankwise.compose("dora(alpha=4, inner=lora(rank=2))"), where=["0"])


def test_a_rank_beside_inner_replaces_its_own() -> None:
    recipe = rankwise.compose("dora(inner=lora(rank=2))")
    assert recipe.parameterization.factory.width_of(8, 6, **recipe.parameterization.arguments) == 2
    recipe = rankwise.Recipe(**{**recipe.__dict__, "ranks": {"0": 3}})
    handle = rankwise.adapt_(model(), recipe, where=["0"])
    assert handle.parameterization("0").rank == handle.parameterization("0").inner.A.shape[0] == 3


def test_norms_stay_exact_under_autocast() -> None:
    layers = model().float()
    handle = rankwise.adapt_(layers, rankwise.compose("dora(rank=2)"), where=["0"])
    scatter(handle)
    entry = handle.parameterization("0")
    assert isinstance(entry, Magnitude)
    base = handle.adapters("0").base(layers[0])
    expected = entry.forward(base).scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entry.forward(base).scale
        assert layers(X.float()).dtype is torch.bfloat16
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
