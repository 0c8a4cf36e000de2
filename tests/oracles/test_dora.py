"""Oracles of DoRA: W' = diag(μ / ‖V‖_row) V with V = W + s·B A, μ = ‖W‖_row at the start."""

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from rankwise.core.combinators import Sum
from rankwise.core.operators import LowRank
from rankwise.core.queries import row_norms
from tests.oracles.tools import adapted, backward, central_difference, close, fill, grad, linear, put, randn

dora = rw.catalog.dora
M, N, SCALE = 7, 5, 1.5


def generic(**options):
    """(model, handle, roles, W, V, b) at a generic point, with s = 1.5."""
    layer = linear(M, N)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, handle, p = adapted(dora(rank=2, alpha=2 * SCALE, **options), layer)
    fill(handle)
    roles = p.roles()
    V = (W + SCALE * roles["B"] @ roles["A"]).detach()
    return model, handle, roles, W, V, b


def effective(W, B, A, magnitude, scale=SCALE):
    V = W + scale * B @ A
    return magnitude[:, None] * V / V.norm(dim=1, keepdim=True)


def test_1_starts_at_the_base_in_float32():
    layer, x = linear(M, N, dtype=torch.float32), randn(9, N, seed=1, dtype=torch.float32)
    W, base = layer.weight.detach().clone(), layer(x).detach()
    model, handle, p = adapted(dora(rank=2), layer)
    close(p.roles()["magnitude"], W.norm(dim=1), 1e-6)
    assert (model(x) - base).abs().max() <= 1e-5 * base.abs().max()
    handle.merge_()
    assert (layer.weight - W).abs().max() < 1e-6 * W.abs().max()


def test_2_row_norms_of_the_merged_weight_are_the_magnitudes():
    model, handle, roles, W, *_ = generic()
    expected = effective(W, roles["B"], roles["A"], roles["magnitude"])
    handle.merge_()
    close(model.layer.weight.norm(dim=1), roles["magnitude"].abs(), 1e-12)
    close(model.layer.weight, expected, 1e-12)


def test_3_scale_invariance_and_linearity_in_the_magnitudes():
    model, _, roles, W, _, b = generic()
    x, c = randn(9, N, seed=1), torch.rand(M, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    before = model(x).detach()
    other = linear(M, N)
    put(other.weight, c[:, None] * W)
    scaled, _, q = adapted(dora(rank=2, alpha=2 * SCALE), other)
    for role, tensor in roles.items():
        put(q.roles()[role], c[:, None] * tensor if role == "B" else tensor)
    close(scaled(x), before, 1e-12)
    put(roles["magnitude"], 2 * roles["magnitude"])
    close(model(x) - b, 2 * (before - b), 1e-12)


@pytest.mark.parametrize("detach", [True, False])
def test_4_gradients(detach):
    model, _, roles, W, V, _ = generic(detach_norm=detach)
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    G, norms = backward(model, x, g), V.norm(dim=1)
    gain, unit = roles["magnitude"].detach() / norms, V / norms[:, None]
    through = G if detach else G - (G * unit).sum(1, keepdim=True) * unit
    close(grad(roles["B"]), SCALE * gain[:, None] * through @ roles["A"].detach().t(), 1e-10)
    close(grad(roles["A"]), SCALE * roles["B"].detach().t() @ (gain[:, None] * through), 1e-10)
    close(grad(roles["magnitude"]), (G * V).sum(1) / norms, 1e-10)
    if not detach:
        assert ((through * V).sum(1)).abs().max() < 1e-10 * G.norm() * V.norm()

    # Finite differences of the surrogate: the loss with the norms held, or not.
    values = {role: tensor.detach() for role, tensor in roles.items()}

    def loss(**changed):
        now = {**values, **changed}
        direction = W + SCALE * now["B"] @ now["A"]
        length = norms if detach else direction.norm(dim=1)
        return float((G * (now["magnitude"] / length)[:, None] * direction).sum())

    for role in roles:
        close(grad(roles[role]), central_difference(lambda t, role=role: loss(**{role: t}), values[role]), 1e-6)


def test_4_first_gradient_of_b_is_that_of_lora():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    gradients = []
    for recipe in (dora(rank=2, alpha=3.0), rw.catalog.lora(rank=2, alpha=3.0)):
        model, _, p = adapted(recipe, linear(M, N))
        backward(model, x, g)
        gradients.append((p.roles()["A"].detach(), grad(p.roles()["B"])))
    assert torch.equal(gradients[0][0], gradients[1][0])  # the same seed draws the same A
    close(gradients[0][1], gradients[1][1], 1e-12)


@pytest.mark.parametrize("direction", [True, False])
def test_5_without_b_it_tunes_one_gain_per_output(direction):
    layer, x = linear(M, N), randn(9, N, seed=1)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, _, p = adapted(dora(rank=2) if direction else dora(direction=False), layer)
    assert ("B" in p.roles()) is direction
    magnitude = randn(M, seed=6)
    put(p.roles()["magnitude"], magnitude)
    close(model(x), (magnitude / W.norm(dim=1)) * F.linear(x, W) + b, 1e-12)


def test_6_both_code_paths_merge_and_unmerge():
    x, outputs = randn(9, N, seed=1), []
    for dropout in (0.0, 0.5):
        model, handle, roles, W, _, b = generic(dropout=dropout)
        model.eval()
        outputs.append(model(x).detach())
        close(outputs[-1], F.linear(x, effective(W, roles["B"], roles["A"], roles["magnitude"]), b), 1e-12)
        handle.merge_()
        close(model(x), outputs[-1], 1e-10)
        handle.unmerge_()
        close(model.layer.weight, W, 1e-12)
    close(outputs[1], outputs[0], 1e-6)


def test_6_dropout_masks_base_and_update_alike():
    # y = W x + b + (g - 1)(W x_d) + g s B A x_d: linear in the mask, so both terms must have met the same one.
    model, _, roles, W, V, b = generic(dropout=0.5)
    x = torch.eye(N, dtype=torch.float64).repeat(4, 1)  # row j of x_d is either 0 or 2 e_j
    model.train()
    gain = roles["magnitude"].detach() / V.norm(dim=1)
    y = model(x).detach()
    dropped = (W.t() + b).repeat(4, 1)
    kept = dropped + 2 * ((gain[:, None] - 1) * W + gain[:, None] * (V - W)).t().repeat(4, 1)
    is_dropped, is_kept = (y - dropped).norm(dim=1) < 1e-10, (y - kept).norm(dim=1) < 1e-10
    assert bool((is_dropped ^ is_kept).all()) and bool(is_dropped.any()) and bool(is_kept.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_6_expanded_row_norms(dtype):
    layer = linear(M, N, dtype=dtype)
    model, handle, _ = adapted(rw.catalog.lora(rank=2), layer)
    base = handle.adapters("layer").base(model.layer)
    B, A = randn(M, 2, seed=3, dtype=dtype), randn(2, N, seed=4, dtype=dtype)
    V = layer.weight.detach() + SCALE * B @ A
    close(row_norms(Sum(base, LowRank(B, A, SCALE))), V.norm(dim=1), 1e-5)
    # An update that cancels rows exactly: rounding may make the square negative, which must not become NaN.
    put(layer.weight, -SCALE * B @ A)
    norms = row_norms(Sum(base, LowRank(B, A, SCALE)))
    assert torch.isfinite(norms).all() and norms.max() < 1e-2 * (B @ A).norm()
