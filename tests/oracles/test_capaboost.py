"""Oracles of CapaBoost: update = s Σ_i (B ∘ M_i^B)(A ∘ M_i^A), d branches of fixed random masks on one shared pair (B, A)."""

import pytest
import torch

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, close, fill, grad, linear, put, randn

capaboost = rw.catalog.capaboost


def dense(p, scale, A=None, B=None):
    """The sum over branches, entry by entry masked."""
    A, B = p.roles()["A"] if A is None else A, p.roles()["B"] if B is None else B
    return scale * sum((B * b) @ (A * a) for a, b in zip(p.mask_A, p.mask_B, strict=True))


def train(model, handle, steps, *, lr=0.05, **options):
    x, y = randn(9, 5, seed=1), randn(9, 7, seed=2)
    optimizer = handle.optimizer(lr=lr, **options)
    states = []
    for _ in range(steps):
        (model(x) - y).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        states.append(handle.update_of("layer").dense().detach().clone())
    return states


@pytest.mark.parametrize("step", ["sgd", "adamw"])
@pytest.mark.parametrize("branches", [1, 3])
def test_1_without_masks_it_is_lora(step, branches):
    options = {"rank": 2, "alpha": 3.0, "branches": branches, "density": 1.0}
    one, handle, p = adapted(rw.compose(capaboost(**options), getattr(rw.catalog, step)()), linear(7, 5))
    lora = rw.catalog.lora(rank=2, alpha=3.0 * branches)  # equal branches add up: scale d · s
    two, plain, q = adapted(rw.compose(lora, getattr(rw.catalog, step)()), linear(7, 5))
    assert p.mask_A.all() and p.mask_B.all()
    assert handle.trained_numbers == plain.trained_numbers == 2 * (7 + 5)
    for role in "AB":
        put(q.roles()[role], p.roles()[role])
    for mine, theirs in zip(train(one, handle, 5), train(two, plain, 5), strict=True):
        assert theirs.norm() > 1e-3
        close(mine, theirs, 1e-6)


def test_1_starts_like_lora():
    layer, x, g = linear(7, 5), randn(9, 5, seed=1), randn(9, 7, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(capaboost(rank=4, branches=3), layer)
    assert torch.equal(model(x), base) and not p.roles()["B"].any()
    backward(model, x, g)
    assert grad(p.roles()["B"]).any() and not grad(p.roles()["A"]).any()
    _, _, wide = adapted(capaboost(rank=8), linear(9, 400))
    assert 0.049 < float(wide.roles()["A"].abs().max()) <= 0.05  # U(-1/√n, 1/√n), not 1/√r


@pytest.mark.parametrize("seed", range(20))
def test_2_masks_multiply_the_rank(seed):
    _, handle, p = adapted(capaboost(rank=2, branches=3, density=0.5), linear(64, 64), seed=seed)
    fill(handle)
    S = torch.linalg.svdvals(handle.update_of("layer").dense())
    assert S[5] > 1e-3 * S[0] and S[6] < 1e-12 * S[0]
    unmasked = torch.linalg.svdvals(3 * p.roles()["B"] @ p.roles()["A"])
    assert unmasked[2] < 1e-12 * unmasked[0]


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("masks", ["uniform", "nm"])
def test_3_by_definition(branches, masks):
    model, handle, p = adapted(capaboost(rank=4, alpha=6.0, branches=branches, masks=masks), linear(8, 12))
    assert p.mask_A.shape == (branches, 4, 12) and p.mask_B.shape == (branches, 8, 4)
    assert p.mask_A.dtype == p.mask_B.dtype == torch.bool
    fill(handle)
    x = randn(5, 12, seed=1)
    close(handle.update_of("layer").dense(), dense(p, 1.5), 1e-12)
    close(model(x), x @ (model.layer.weight + dense(p, 1.5)).t() + model.layer.bias, 1e-12)


def test_3_complementary_masks():
    _, handle, p = adapted(capaboost(rank=4, alpha=6.0), linear(8, 12))
    fill(handle)
    one, other = randn(8, 4, seed=3) > 0, randn(4, 12, seed=4) > 0
    put(p.mask_B, torch.stack([one, ~one]))
    put(p.mask_A, torch.stack([other, ~other]))
    A, B = p.roles()["A"], p.roles()["B"]
    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.where(one, B, zero) @ torch.where(other, A, zero) + torch.where(one, zero, B) @ torch.where(other, zero, A)
    close(handle.update_of("layer").dense(), 1.5 * expected, 1e-12)


def test_4_gradient():
    model, handle, p = adapted(capaboost(rank=4, alpha=6.0, branches=3), linear(8, 12))
    fill(handle)
    G = backward(model, randn(5, 12, seed=1), randn(5, 8, seed=2))
    A, B = p.roles()["A"], p.roles()["B"]
    masks = list(zip(p.mask_A, p.mask_B, strict=True))
    close(grad(A), 1.5 * sum(a * ((B * b).t() @ G) for a, b in masks), 1e-12)
    close(grad(B), 1.5 * sum(b * (G @ (A * a).t()) for a, b in masks), 1e-12)
    assert not grad(A)[~p.mask_A.any(0)].any() and not grad(B)[~p.mask_B.any(0)].any()


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_4_a_step_equals_that_of_masked_copies(step):
    """The released procedure: d copies, each masked, whose masked gradients are summed before one step on the dense pair."""
    recipe = rw.compose(capaboost(rank=4, alpha=6.0, branches=3), getattr(rw.catalog, step)())
    model, handle, p = adapted(recipe, linear(7, 5))
    fill(handle)
    start = {role: p.roles()[role].detach().clone() for role in "AB"}
    x, y = randn(9, 5, seed=1), randn(9, 7, seed=2)
    copies = [
        ((start["A"] * a).requires_grad_(), (start["B"] * b).requires_grad_()) for a, b in zip(p.mask_A, p.mask_B, strict=True)
    ]
    h = x @ model.layer.weight.detach().t() + model.layer.bias.detach() + 1.5 * sum(x @ A.t() @ B.t() for A, B in copies)
    (h - y).square().mean().backward()
    shared = {role: start[role].clone().requires_grad_() for role in "AB"}
    shared["A"].grad = sum(a * grad(A) for a, (A, _) in zip(p.mask_A, copies, strict=True))
    shared["B"].grad = sum(b * grad(B) for b, (_, B) in zip(p.mask_B, copies, strict=True))
    options = {"weight_decay": 0.0} if step == "adamw" else {}
    reference = torch.optim.SGD(shared.values(), lr=0.05) if step == "sgd" else torch.optim.Adam(shared.values(), lr=0.05)
    reference.step()
    train(model, handle, 1, **options)
    for role in "AB":
        assert not torch.allclose(shared[role], start[role])
        close(p.roles()[role], shared[role], 1e-12 if step == "sgd" else 1e-9)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.25])
@pytest.mark.parametrize("branches", [2, 4])
def test_5_the_density_is_exact(density, branches):
    _, _, p = adapted(capaboost(rank=3, density=density, branches=branches), linear(7, 13))
    for masks in (p.mask_A, p.mask_B):
        counts = masks.flatten(1).sum(1).tolist()
        assert counts == [int(density * masks[0].numel())] * branches
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == branches


def test_5_the_density_is_the_same_for_every_entry():
    _, _, p = adapted(capaboost(rank=4, branches=200, density=0.25), linear(6, 8))
    for masks in (p.mask_A, p.mask_B):  # 200 draws: a standard error of 0.03
        assert float((masks.double().mean(0) - 0.25).abs().max()) < 0.15


def test_5_structured_masks_keep_two_of_four():
    _, _, p = adapted(capaboost(rank=4, masks="nm", branches=3), linear(8, 12))
    for masks in (p.mask_A, p.mask_B):
        assert (masks.reshape(-1, 4).sum(1) == 2).all()
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 3
        assert len({tuple(group.tolist()) for group in masks.reshape(-1, 4)}) > 3


@pytest.mark.parametrize("masks", ["uniform", "nm"])
def test_5_masks_survive_saving_and_follow_the_seed(masks, tmp_path):
    recipe = capaboost(rank=4, masks=masks)
    _, handle, p = adapted(recipe, linear(8, 12), seed=3)
    fill(handle)
    again = rw.load_(One(linear(8, 12)), handle.save(tmp_path / "adapter"))
    q = again.parameterization("layer")
    assert torch.equal(p.mask_A, q.mask_A) and torch.equal(p.mask_B, q.mask_B)
    close(again.update_of("layer").dense(), handle.update_of("layer").dense(), 1e-12)
    _, _, same = adapted(recipe, linear(8, 12), seed=3)
    _, _, other = adapted(recipe, linear(8, 12), seed=4)
    assert torch.equal(p.mask_A, same.mask_A) and not torch.equal(p.mask_A, other.mask_A)


def test_6_export_stacks_the_branches():
    model, handle, p = adapted(capaboost(rank=2, alpha=3.0, branches=3), linear(9, 12))
    fill(handle)
    factors = handle.low_rank_of("layer")
    assert factors is not None and factors.rank == 6
    A, B = p.roles()["A"], p.roles()["B"]
    stacked_B = torch.cat([B * mask for mask in p.mask_B], 1)
    stacked_A = torch.cat([A * mask for mask in p.mask_A], 0)
    close(factors.B @ factors.A, 1.5 * stacked_B @ stacked_A, 1e-12)
    x = randn(5, 12, seed=1)
    exported = x @ (model.layer.weight + factors.B @ factors.A).t() + model.layer.bias
    close(model.eval()(x), exported, 1e-6)
