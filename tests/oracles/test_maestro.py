"""Maestro against its spec (arXiv:2308.14929): W' = B A at full inner rank, a sampled prefix per step, suffix-norm lasso.

The oracles are the spec's list in its order. Multiplying a layer back to a dense one at the end belongs to deployment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise as rw
from rankwise.procedures.maestro import Sampler, group_lasso, importance
from tests.oracles.tools_training import SITE, layer_model, normal, orthonormal, relative, truncated, with_spectrum

M, N = 6, 5
SIGMA = [5.0, 4.0, 3.0, 2.0, 1.0]


def begin(model: nn.Module, *, lr: float, where=None, **arguments):
    """(model, handle, optimizer): plain SGD on the factors."""
    recipe = rw.compose(rw.catalog.maestro(**arguments), "sgd")
    handle = rw.adapt_(model, recipe) if where is None else rw.adapt_(model, recipe, where=where)
    return model, handle, handle.optimizer(lr)


def finish(begun, loss) -> Tensor:
    _, handle, optimizer = begun
    value = handle.backward(loss)
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()
    return value


def factors(handle: rw.Handle, site: str = SITE) -> tuple[Tensor, Tensor]:
    roles = handle.parameterization(site).roles()
    return roles["B"].detach().clone(), roles["A"].detach().clone()


def put(handle: rw.Handle, B: Tensor, A: Tensor) -> None:
    roles = handle.parameterization(SITE).roles()
    with torch.no_grad():
        roles["B"].copy_(B)
        roles["A"].copy_(A)


def nested_loss(begun, x: Tensor, target: Tensor) -> Tensor:
    """The mean over b = 1 … R of ‖x W_bᵀ - target‖², W_b = B[:, :b] A[:b], through the layer."""
    model, handle, _ = begun
    entry, rank = handle.parameterization(SITE), min(target.shape[1], x.shape[1])
    total = torch.zeros((), dtype=torch.float64)
    for b in range(1, rank + 1):
        entry.prefix = b
        total = total + (model(x) - target).square().sum() / rank
    entry.prefix = None
    return total


def suffix_norms(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    rank = A.shape[0]
    return (
        torch.stack([B[:, b:].square().sum().sqrt() for b in range(rank)]),
        torch.stack([A[b:].square().sum().sqrt() for b in range(rank)]),
    )


def test_0_prefix_of_a_layer() -> None:
    weight, x = normal(0, M, N), normal(1, 7, N)
    model, handle, _ = begin(layer_model(weight), lr=0.1)
    B, A = factors(handle)
    assert B.shape == (M, N) and A.shape == (N, N)
    entry = handle.parameterization(SITE)
    model.train()
    for b in range(1, N + 1):
        entry.prefix = b
        assert relative(model(x), x @ (B[:, :b] @ A[:b]).T) < 1e-12
    entry.prefix = 2
    (g,) = torch.autograd.grad(model(x).square().sum(), [entry.roles()["B"]])
    assert not g[:, 2:].any() and g[:, :2].any()
    entry.prefix = None
    assert relative(model(x), x @ weight.T) < 1e-12
    entry.prefix = 2
    model.eval()  # prefixes are for training
    assert relative(model(x), x @ weight.T) < 1e-12


def test_0_lasso_and_importance_are_their_formulas() -> None:
    B, A = normal(2, M, N), normal(3, N, 8)
    right, left = suffix_norms(B, A)
    assert float(group_lasso(B, A, True)) == pytest.approx(float((left + right).sum()), rel=1e-12)
    plain = A.norm(dim=1).sum() + B.norm(dim=0).sum()
    assert float(group_lasso(B, A, False)) == pytest.approx(float(plain), rel=1e-12)
    assert relative(importance(B, A), left * right) < 1e-12


@pytest.mark.parametrize("hierarchical", [True, False])
def test_0_the_penalty_joins_the_gradients(hierarchical: bool) -> None:
    """λ times the gradient of the lasso on the factors, beside the loss (here zero); finite where a suffix is all zeros."""
    model, handle, _ = begin(layer_model(normal(0, M, N)), lr=0.1, penalty=0.3, hierarchical=hierarchical)
    B, A = factors(handle)
    twins = B.clone().requires_grad_(), A.clone().requires_grad_()
    right, left = suffix_norms(*twins)
    value = (left + right).sum() if hierarchical else twins[1].norm(dim=1).sum() + twins[0].norm(dim=0).sum()
    expected = torch.autograd.grad(value, twins)
    handle.backward(lambda: 0.0 * model(normal(1, 3, N)).sum())
    for role, grad in zip(("B", "A"), expected, strict=True):
        found = handle.parameterization(SITE).roles()[role].grad
        assert found is not None and relative(found, 0.3 * grad) < 1e-9
    B[:, 3:], A[3:] = 0, 0
    twins = B.requires_grad_(), A.requires_grad_()
    for grad in torch.autograd.grad(group_lasso(*twins, hierarchical), twins):
        assert torch.isfinite(grad).all()


def test_1_nested_best_approximations_are_the_minimum() -> None:
    """x white, y = T x, uniform b: the mean of Σ_{i>b} σ_i², with zero gradient, and more anywhere else."""
    target, eye = with_spectrum(4, M, N, SIGMA), torch.eye(N, dtype=torch.float64)
    begun = begin(layer_model(target), lr=0.0, penalty=0.0)
    model, handle, _ = begun
    B, A = factors(handle)
    least = sum(sum(s**2 for s in SIGMA[b:]) for b in range(1, N + 1)) / N
    model.train()
    for b in range(1, N + 1):
        assert relative(B[:, :b] @ A[:b], truncated(target, b)) < 1e-12
    assert float(nested_loss(begun, eye, target.T)) == pytest.approx(least, rel=1e-12)
    handle.backward(lambda: nested_loss(begun, eye, target.T))
    for role in ("B", "A"):
        grad = handle.parameterization(SITE).roles()[role].grad
        assert grad is not None and float(grad.norm()) < 1e-12 * least
    for k in range(20):
        put(handle, B + 0.1 * normal(50 + k, M, N), A + 0.1 * normal(80 + k, N, N))
        assert float(nested_loss(begun, eye, target.T)) > least * (1 + 1e-6)
    turn = orthonormal(5, N, N)  # the same product, another order
    put(handle, B @ turn, turn.T @ A)
    assert relative(model(eye).T, target) < 1e-12
    assert float(nested_loss(begun, eye, target.T)) > 1.05 * least


def test_1_training_finds_the_nested_approximations() -> None:
    sigma = [3.0, 2.0, 1.0]
    target, eye = with_spectrum(4, 4, 3, sigma), torch.eye(3, dtype=torch.float64)
    begun = begin(layer_model(target + 0.3 * normal(6, 4, 3)), lr=0.06, penalty=0.0, interval=10**6)
    begun[0].train()
    for _ in range(500):
        finish(begun, lambda: nested_loss(begun, eye, target.T))
    B, A = factors(begun[1])
    for b in range(1, 4):
        assert relative(B[:, :b] @ A[:b], truncated(target, b)) < 1e-3


def test_1_the_identity_on_data_gives_principal_components_in_order() -> None:
    size, Q = 3, orthonormal(7, 3, 3)
    values = torch.tensor([4.0, 2.5, 0.5], dtype=torch.float64)
    x = Q.T * values.sqrt()[:, None]  # rows whose second moments are Q diag(values) Qᵀ
    begun = begin(
        layer_model(torch.eye(size, dtype=torch.float64) + 0.3 * normal(8, size, size)), lr=0.12, interval=10**6, penalty=0.0
    )
    begun[0].train()
    for _ in range(500):
        finish(begun, lambda: nested_loss(begun, x, x))
    B, A = factors(begun[1])
    for b in range(1, size + 1):
        assert relative(B[:, :b] @ A[:b], Q[:, :b] @ Q[:, :b].T) < 1e-3
    assert float(nested_loss(begun, x, x).detach()) == pytest.approx((3.0 + 0.5 + 0.0) / 3, rel=1e-5)


def test_2_a_strong_penalty_ends_at_the_bias() -> None:
    model = nn.Sequential()
    model.add_module(SITE, nn.Linear(4, 3).double())
    with torch.no_grad():
        model[0].weight.copy_(0.3 * normal(9, 3, 4))
    begun = begin(model, lr=1e-2, penalty=1.0, threshold=0.02, interval=5)
    x, ranks = normal(10, 5, 4), []
    for _ in range(200):
        finish(begun, lambda: 0.0 * model(x).sum())
        model.eval()  # the whole layer, no prefix
        ranks.append(int(torch.linalg.matrix_rank(model[0].weight + begun[1].update_of(SITE).dense().detach(), rtol=1e-9)))
        model.train()
    assert ranks[0] == 3 and ranks[-1] == 0
    assert all(later <= earlier for earlier, later in pairwise(ranks))
    for training in (True, False):
        model.train(training)
        assert torch.equal(model(x), model[0].bias.expand(5, 3))


def test_2_weaker_penalties_keep_a_prefix() -> None:
    """With a loss that wants two directions the others go, and B and A keep their leading columns and rows."""
    target, eye = with_spectrum(11, 4, 4, [4.0, 3.0]), torch.eye(4, dtype=torch.float64)
    begun = begin(layer_model(target + 0.05 * normal(12, 4, 4)), lr=5e-3, penalty=0.5, threshold=0.02, interval=10)
    model, handle, _ = begun
    for _ in range(300):
        finish(begun, lambda: (model(eye) - target.T).square().sum())
    model.eval()
    W = model(eye).T.detach()
    B, A = factors(handle)
    assert torch.linalg.matrix_rank(W, rtol=1e-9) == 2
    assert relative(W, B[:, :2] @ A[:2]) < 1e-12
    assert relative(W, target) < 0.3


def test_3_importance_never_rises() -> None:
    for seed in range(20):
        B, A = normal(seed, M, N), normal(100 + seed, N, 8)
        values = importance(B, A)
        assert values.shape == (N,) and (values[1:] <= values[:-1]).all() and (values > 0).all()
        B[:, 3:] = 0
        values = importance(B, A)
        assert (values[:3] > 0).all() and not values[3:].any()


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_4_decomposed_and_multiplied_back(shape: tuple[int, int]) -> None:
    weight, x = normal(13, *shape), normal(14, 3, shape[1])
    model, handle, _ = begin(layer_model(weight), lr=0.1)
    model.eval()
    B, A = factors(handle)
    d = torch.linalg.svdvals(weight)
    assert relative(B.T @ B, torch.diag(d)) < 1e-10 and relative(A @ A.T, torch.diag(d)) < 1e-10  # √S on either side
    assert relative(model(x), x @ weight.T) < 1e-12
    assert relative(B @ A, weight) < 1e-12
    assert float(handle.update_of(SITE).dense().norm()) < 1e-12
    assert handle.trained_numbers == min(shape) * sum(shape)


def test_4_a_convolution() -> None:
    model = nn.Sequential()
    model.add_module(SITE, nn.Conv2d(4, 6, 3, padding=1, stride=2).double())
    x = normal(15, 2, 4, 7, 7)
    expected = model(x).detach()
    _, handle, _ = begin(model, lr=0.1, where=[SITE])
    assert relative(model.eval()(x), expected) < 1e-12
    B, A = factors(handle)
    assert B.shape == (6, 6) and A.shape == (6, 36)
    model.train()
    handle.parameterization(SITE).prefix = 2
    kernel = (B[:, :2] @ A[:2]).reshape(6, 4, 3, 3)
    assert relative(model(x), F.conv2d(x, kernel, model[0].bias, stride=2, padding=1)) < 1e-12


def test_5_without_a_threshold_nothing_is_pruned() -> None:
    begun = begin(layer_model(0.3 * normal(9, 3, 4)), lr=1e-2, penalty=1.0, threshold=0.0, interval=2)
    model, handle, _ = begun
    for _ in range(100):
        finish(begun, lambda: 0.0 * model(normal(10, 5, 4)).sum())
    B, A = factors(handle)
    assert importance(B, A)[0] < 0.02  # a threshold would have acted
    assert B.shape == (3, 3) and A.shape == (3, 4)
    B, A, x = normal(19, 3, 3), normal(20, 3, 4), normal(10, 5, 4)
    put(handle, B, A)
    model.eval()
    assert relative(model(x), x @ (B @ A).T) < 1e-12  # every component still acts


def cut(item: Any) -> dict[str, int]:
    """The sites that a step cuts, with their prefixes: a mapping or one (site, prefix); None is a whole layer."""
    pairs = item.items() if isinstance(item, Mapping) else [item]
    return {site: prefix for site, prefix in pairs if prefix is not None}


def test_6_each_layer_and_prefix_once_per_list() -> None:
    ranks = {"first": 5, "second": 3, "third": 1}
    everything = {(site, b): 1 for site, rank in ranks.items() for b in range(1, rank + 1)}
    stream = iter(Sampler(ranks, "per_layer", 0))
    lists = []
    for _ in range(6):
        taken = [cut(item) for item in islice(stream, len(everything))]
        assert all(len(item) == 1 for item in taken)
        lists.append([next(iter(item.items())) for item in taken])
        assert Counter(lists[-1]) == Counter(everything)
    assert len({tuple(order) for order in lists}) > 1  # shuffled anew
    again = iter(Sampler(ranks, "per_layer", 0))
    assert [next(iter(cut(item).items())) for item in islice(again, 9)] == lists[0]
    other = iter(Sampler(ranks, "per_layer", 1))
    assert [next(iter(cut(item).items())) for item in islice(other, 9)] != lists[0]


def test_6_every_layer_by_itself() -> None:
    ranks, draws = {"first": 5, "second": 3}, 3000
    taken = [cut(item) for item in islice(iter(Sampler(ranks, "across_layers", 0)), draws)]
    assert all(set(item) == set(ranks) for item in taken)
    pairs = Counter((item["first"], item["second"]) for item in taken)
    assert set(pairs) == {(a, b) for a in range(1, 6) for b in range(1, 4)}
    chi = sum((count - draws / 15) ** 2 for count in pairs.values()) / (draws / 15)
    assert chi < 36.1  # 14 degrees of freedom, one in a thousand


def test_6_the_sampler_rules_training() -> None:
    model = layer_model(normal(16, 4, 3), after=normal(17, 2, 4))
    begun = begin(model, lr=1e-3, penalty=0.0, threshold=0.0, interval=10**6)
    handle, x = begun[1], normal(18, 5, 3)
    model.train()
    taken = []
    for _ in range(10):  # twice 3 + 2

        def closure() -> Tensor:
            loss = model(x).square().sum()
            prefixes = {site: handle.parameterization(site).prefix for site in (SITE, "after")}
            taken.append({site: b for site, b in prefixes.items() if b is not None})
            whole = dict.fromkeys(prefixes, 10) | taken[-1]
            hidden = x @ (factors(handle)[0][:, : whole[SITE]] @ factors(handle)[1][: whole[SITE]]).T
            B, A = factors(handle, "after")
            assert relative(loss, (hidden @ (B[:, : whole["after"]] @ A[: whole["after"]]).T).square().sum()) < 1e-12
            return loss

        finish(begun, closure)
    for half in (taken[:5], taken[5:]):
        assert all(len(item) == 1 for item in half)
        pairs = Counter(next(iter(item.items())) for item in half)
        assert pairs == Counter({(SITE, 1): 1, (SITE, 2): 1, (SITE, 3): 1, ("after", 1): 1, ("after", 2): 1})
