"""Oracles of BoRA: W' = diag(q) V diag(p) with V = W + s·B A, row magnitudes first and column magnitudes second.

`order="column"` is the same method on transposed matrices: columns first, rows second.
"""

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, central_difference, close, fill, grad, linear, put, randn

bora = rw.catalog.bora
M, N, SCALE = 7, 5, 1.5
ORDERS = ["row", "column"]


def positive(size, seed):
    """Numbers in (0.5, 2)."""
    return 0.5 + 1.5 * torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def generic(**options):
    """(model, handle, roles, W) at a generic point with positive magnitudes."""
    layer = linear(M, N)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(bora(rank=2, alpha=2 * SCALE, **options), layer)
    fill(handle)
    roles = p.roles()
    put(roles["row_magnitude"], positive(M, 3))
    put(roles["column_magnitude"], positive(N, 4))
    return model, handle, roles, W


def effective(W, B, A, row_magnitude, column_magnitude, order="row", norms=None):
    """W', H, V and the two norms, step by step with dense matrices; `norms` holds the two fixed."""
    V = W + SCALE * B @ A
    first, second = (1, 0) if order == "row" else (0, 1)  # the dimension that each norm sums over
    gains = (row_magnitude, column_magnitude) if order == "row" else (column_magnitude, row_magnitude)
    n1 = V.norm(dim=first) if norms is None else norms[0]
    H = V * (gains[0] / n1).unsqueeze(first)
    n2 = H.norm(dim=second) if norms is None else norms[1]
    return H * (gains[1] / n2).unsqueeze(second), H, V, n1, n2


def values(roles):
    return {role: tensor.detach().clone() for role, tensor in roles.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_1_starts_at_the_base(order):
    for dtype, tolerance in ((torch.float32, 1e-6), (DOUBLE, 1e-14)):
        layer = linear(M, N, dtype=dtype)
        W = layer.weight.detach().clone()
        model, handle, p = adapted(bora(rank=2, order=order), layer)
        assert torch.equal(p.roles()["B"], torch.zeros(M, 2, dtype=dtype))
        close(p.roles()["row_magnitude"], W.norm(dim=1), 1e-6)
        close(p.roles()["column_magnitude"], W.norm(dim=0), 1e-6)
        assert (rw.effective_weights(model)["layer.weight"] - W).abs().max() <= tolerance * W.abs().max()
        assert handle.trained_numbers == 2 * (M + N) + M + N


@pytest.mark.parametrize("order", ORDERS)
def test_2_norms_of_the_last_step_are_the_magnitudes(order):
    _, handle, roles, _ = generic(order=order)
    put(roles["column_magnitude" if order == "row" else "row_magnitude"], randn(N if order == "row" else M, seed=8))
    expected = effective(handle.model.layer.weight.detach(), **values(roles), order=order)[0]
    handle.merge_()
    merged = handle.model.layer.weight
    close(merged, expected, 1e-12)
    last, other = ("column", "row") if order == "row" else ("row", "column")
    dims = {"row": 1, "column": 0}
    close(merged.norm(dim=dims[last]), roles[f"{last}_magnitude"].abs(), 1e-12)
    assert (
        merged.norm(dim=dims[other]) - roles[f"{other}_magnitude"].abs()
    ).norm() > 0.1  # only approximately, here not at all


@pytest.mark.parametrize("order", ORDERS)
def test_3_gauge_of_the_first_magnitudes(order):
    x = randn(9, N, seed=1)
    model, _, roles, _ = generic(order=order)
    before, first = model(x).detach(), roles["row_magnitude" if order == "row" else "column_magnitude"]
    put(first, 3.7 * first)
    close(model(x), before, 1e-12)


def test_3_the_redundant_direction_has_no_gradient():
    x, g = randn(9, N, seed=1), randn(9, M, seed=2)
    products = []
    for detach in (False, True):
        model, _, roles, _ = generic(detach_norm=detach)
        backward(model, x, g)
        mu = roles["row_magnitude"]
        products.append(float((grad(mu) * mu.detach()).sum() / (grad(mu).norm() * mu.detach().norm())))
    assert abs(products[0]) < 1e-12
    assert abs(products[1]) > 1e-3  # detached norms do not know of it


def test_3_row_scales_of_the_weight_and_b_do_not_matter():
    x, c = randn(9, N, seed=1), positive(M, 6)
    model, _, roles, W = generic()
    layer = linear(M, N)
    put(layer.weight, c[:, None] * W)
    other, _, q = adapted(bora(rank=2, alpha=2 * SCALE), layer)
    for role, tensor in roles.items():
        put(q.roles()[role], c[:, None] * tensor if role == "B" else tensor)
    close(other(x), model(x), 1e-12)


def test_4_row_and_column_gains_are_both_within_reach():
    d, e = positive(M, 6), positive(N, 7)
    for gains in ("row", "column"):
        layer = linear(M, N)
        W = layer.weight.detach().clone()
        model, _, p = adapted(bora(rank=2), layer)
        roles = p.roles()
        if gains == "row":
            target = d[:, None] * W
            put(roles["row_magnitude"], d * roles["row_magnitude"])
            put(roles["column_magnitude"], target.norm(dim=0))
        else:
            target = W * e
            put(roles["column_magnitude"], e * roles["column_magnitude"])
        close(rw.effective_weights(model)["layer.weight"], target, 1e-12)
        # Gains on the other side alone cannot: the best ones, by least squares, leave a gap.
        dim = 0 if gains == "row" else 1
        best = (target * W).sum(dim, keepdim=True) / W.square().sum(dim, keepdim=True)
        assert (best * W - target).norm() > 0.1 * target.norm()


@pytest.mark.parametrize("order", ORDERS)
def test_5_without_the_column_step_it_is_dora(order):
    x = randn(9, N, seed=1)
    model, _, roles, W = generic(order=order)
    _, H, V, *_ = effective(W, **values(roles), order="row")
    # column step last: magnitudes that are the norms already; column step first: magnitudes that leave V as it is
    put(roles["column_magnitude"], (H if order == "row" else V).norm(dim=0))
    other, _, q = adapted(rw.catalog.dora(rank=2, alpha=2 * SCALE), linear(M, N))
    for role, name in (("B", "B"), ("A", "A"), ("magnitude", "row_magnitude")):
        put(q.roles()[role], roles[name])
    close(model(x), other(x), 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_5_forward_merge_and_unmerge(order):
    x = randn(9, N, seed=1)
    model, handle, roles, W = generic(order=order)
    expected, _, V, *_ = effective(W, **values(roles), order=order)
    y = F.linear(x, expected, model.layer.bias)
    close(model(x), y, 1e-12)
    model.eval()
    with torch.no_grad():
        close(model(x), y, 1e-12)
        close(model(x), y, 1e-12)  # from what eval keeps
        put(roles["row_magnitude"], 2 * roles["row_magnitude"])
        put(roles["column_magnitude"], 3 * roles["column_magnitude"])
        changed = effective(W, **values(roles), order=order)[0]
        close(model(x), F.linear(x, changed, model.layer.bias), 1e-12)
    ratio = changed / V  # q pᵀ: an outer product of gains
    assert torch.linalg.svdvals(ratio)[1] < 1e-10 * torch.linalg.svdvals(ratio)[0]
    handle.merge_()
    close(model.layer.weight, changed, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("detach", [True, False])
def test_6_gradients(detach, order):
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, roles, W = generic(detach_norm=detach, order=order)
    G, now = backward(model, x, g), values(roles)
    _, H, V, n1, n2 = effective(W, **now, order=order)
    if detach:
        first, second = ("row", "column") if order == "row" else ("column", "row")
        gains = {first: now[f"{first}_magnitude"] / n1, second: now[f"{second}_magnitude"] / n2}
        q, p = gains["row"][:, None], gains["column"]
        close(grad(roles["B"]), SCALE * (q * G * p) @ now["A"].t(), 1e-10)
        close(grad(roles["A"]), SCALE * now["B"].t() @ (q * G * p), 1e-10)
        last, inner = (0, p * G * V) if order == "row" else (1, q * G * V)
        close(grad(roles[f"{second}_magnitude"]), (G * H).sum(last) / n2, 1e-10)
        close(grad(roles[f"{first}_magnitude"]), inner.sum(1 - last) / n1, 1e-10)

    def loss(**changed):
        fixed = (n1, n2) if detach else None
        return float((G * effective(W, **{**now, **changed}, order=order, norms=fixed)[0]).sum())

    for role in roles:
        close(grad(roles[role]), central_difference(lambda t, role=role: loss(**{role: t}), now[role]), 1e-6)


def test_dead_inputs_stay_dead():
    layer, x = linear(M, N), randn(9, N, seed=1)
    put(layer.weight[:, 2], 0.0)
    put(layer.weight[4], 0.0)
    base, W = layer(x).detach(), layer.weight.detach().clone()
    model, handle, p = adapted(bora(rank=2), layer)
    close(model(x), base, 1e-12)
    (model(x) * randn(9, M, seed=2)).sum().backward()
    assert all(torch.isfinite(grad(tensor)).all() for tensor in p.roles().values())
    put(p.roles()["row_magnitude"], 2.0)
    handle.merge_()
    assert torch.isfinite(model.layer.weight).all()
    assert torch.equal(model.layer.weight[:, 2], W[:, 2])


def test_strength_is_that_of_the_whole_change():
    x = randn(9, N, seed=1)
    model, _, roles, W = generic()
    full = effective(W, **values(roles))[0]
    rw.activate_(model, {"default": 0.3})
    close(model(x), F.linear(x, W + 0.3 * (full - W), model.layer.bias), 1e-12)
