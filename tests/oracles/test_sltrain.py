"""SLTrain against its spec (arXiv:2406.02214): a low-rank product plus values on a random support, for the weight.

With keep_base=True both are added to a frozen weight instead. Perplexities are not tested; memory is, by the saved tensors.
"""

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import adapted, backward, close, fill, grad, linear, put, randn

sltrain = rw.catalog.sltrain
M, N, RANK, ALPHA, DENSITY = 12, 10, 3, 6.0, 0.2
COUNT = int(DENSITY * M * N)


def build(m=M, n=N, *, rank=RANK, generic=True, seed=0, **options):
    """(model, handle, parameterization, untouched weight, bias)."""
    layer = linear(m, n)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    recipe = sltrain(rank=rank, **{"alpha": ALPHA, "density": DENSITY, **options})
    model, handle, p = adapted(recipe, layer, seed=seed)
    if generic:
        fill(handle)
    return model, handle, p, W, b


def scattered(p, shape=(M, N)):
    """S, differentiable in the values."""
    rows, columns = p.indices
    return torch.zeros(shape, dtype=torch.float64).index_put((rows.long(), columns.long()), p.roles()["values"])


def composed(p, shape=(M, N), *, rank=RANK):
    """s B A + S."""
    roles = p.roles()
    return ALPHA / rank * roles["B"] @ roles["A"] + scattered(p, shape)


def effective(handle, W):
    """W' = W + (W' - W), the whole matrix that acts."""
    return W + handle.update_of("layer").dense()


def off_support(p, shape=(M, N)):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[p.indices[0].long(), p.indices[1].long()] = False
    return mask


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("shape", [(9,), (2, 5), (2, 3, 4)])
def test_1_forward_and_backward_against_the_dense_matrix(keep_base, shape):
    model, handle, p, W, b = build(keep_base=keep_base)
    x = randn(*shape, N, seed=1).requires_grad_()
    g = randn(*shape, M, seed=2)
    twin = {role: tensor.detach().clone().requires_grad_() for role, tensor in p.roles().items()}
    x_twin = x.detach().clone().requires_grad_()
    rows, columns = p.indices
    dense = ALPHA / RANK * twin["B"] @ twin["A"]
    dense = dense.index_put((rows.long(), columns.long()), twin["values"], accumulate=True)
    expected = F.linear(x_twin, dense + W if keep_base else dense, b)
    y = model(x)
    close(y, expected, 1e-12)
    (y * g).sum().backward()
    (expected * g).sum().backward()
    close(grad(x), grad(x_twin), 1e-12)
    for role, tensor in p.roles().items():
        close(grad(tensor), grad(twin[role]), 1e-12)
    close(effective(handle, W), dense + W if keep_base else dense, 1e-12)


def test_1_in_float32():
    layer = linear(M, N, dtype=torch.float32)
    model, handle, p = adapted(sltrain(rank=RANK, alpha=ALPHA, density=DENSITY), layer)
    fill(handle)
    x = randn(8, N, seed=1, dtype=torch.float32)
    rows, columns = p.indices
    S = torch.zeros(M, N).index_put((rows.long(), columns.long()), p.roles()["values"])
    dense = ALPHA / RANK * p.roles()["B"] @ p.roles()["A"] + S
    close(model(x), F.linear(x, dense, layer.bias), 1e-5)


@pytest.mark.parametrize(("m", "n"), [(12, 10), (7, 31), (40, 9)])
@pytest.mark.parametrize("density", [0.03, 0.2, 0.35])
def test_2_start(m, n, density):
    model, handle, p, W, b = build(m, n, density=density, generic=False)
    dense, count = effective(handle, W), int(density * m * n)
    roles = p.roles()
    assert not roles["B"].any() and roles["A"].abs().max() <= n**-0.5
    assert roles["values"].shape == (count,) and tuple(p.indices.shape) == (2, count)
    assert not p.indices.is_floating_point() and not p.indices.requires_grad
    assert len({(int(i), int(j)) for i, j in p.indices.t()}) == count  # without replacement
    assert int(p.indices.min()) >= 0 and int(p.indices[0].max()) < m and int(p.indices[1].max()) < n
    close(dense, scattered(p, (m, n)), 1e-12)
    assert int((dense.abs() > 1e-12).sum()) == count
    assert float(roles["values"].abs().max()) <= n**-0.5
    x = randn(6, n, seed=1)
    close(model(x), F.linear(x, scattered(p, (m, n)), b), 1e-12)


def test_2_start_is_uniform_in_position_and_value():
    _, _, p, _, _ = build(60, 50, density=0.3, generic=False)
    values = p.roles()["values"].detach() * 50**0.5
    assert float(values.abs().max()) > 0.97 and abs(float(values.mean())) < 0.08
    assert float(values.std()) == pytest.approx(3**-0.5, rel=0.06)
    for axis, size in enumerate((60, 50)):
        per_line = p.indices[axis].long().bincount(minlength=size)
        assert int(per_line.min()) > 0 and int(per_line.max()) < 2.2 * 900 / size
    support = {seed: build(generic=False, seed=seed)[2].indices for seed in (0, 1)}
    assert torch.equal(support[0], build(generic=False, seed=0)[2].indices)
    assert not torch.equal(support[0], support[1])


def test_2_beside_a_kept_weight_it_starts_at_the_base():
    layer, x = linear(M, N), randn(6, N, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(sltrain(rank=RANK, density=DENSITY, keep_base=True), layer)
    assert torch.equal(model(x), base) and not handle.update_of("layer").dense().any()
    assert not p.roles()["values"].any() and not p.roles()["B"].any() and p.roles()["A"].abs().max() > 0


@pytest.mark.parametrize("keep_base", [False, True])
def test_3_the_support_never_changes(keep_base):
    model, handle, p, W, _ = build(keep_base=keep_base, generic=False)
    optimizer, indices = handle.optimizer(lr=0.05, weight_decay=0.1), p.indices.clone()
    for step in range(10):
        (model(randn(20, N, seed=step)) - randn(20, M, seed=100 + step)).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    assert torch.equal(p.indices, indices)
    rest = effective(handle, W).detach() - ALPHA / RANK * (p.roles()["B"] @ p.roles()["A"]).detach()
    rest = rest - W if keep_base else rest
    assert float(rest[off_support(p)].abs().max()) < 1e-13
    close(rest, scattered(p).detach(), 1e-12)
    assert p.roles()["B"].abs().max() > 0.01


@pytest.mark.parametrize("keep_base", [False, True])
def test_4_gradients_and_count(keep_base):
    model, handle, p, _, _ = build(keep_base=keep_base)
    G = backward(model, randn(9, N, seed=1), randn(9, M, seed=2))
    roles = p.roles()
    close(grad(roles["values"]), G[p.indices[0].long(), p.indices[1].long()], 1e-12)
    close(grad(roles["B"]), ALPHA / RANK * G @ roles["A"].t(), 1e-12)
    close(grad(roles["A"]), ALPHA / RANK * roles["B"].t() @ G, 1e-12)
    assert set(roles) == {"A", "B", "values"}
    assert handle.trained_numbers == RANK * (M + N) + COUNT


def test_5_the_two_limits():
    _, handle, p, W, _ = build()
    put(p.roles()["values"], 0.0)
    close(effective(handle, W), ALPHA / RANK * p.roles()["B"] @ p.roles()["A"], 1e-12)
    assert int(torch.linalg.matrix_rank(effective(handle, W))) == RANK
    model, handle, p, W, _ = build()
    put(p.roles()["B"], 0.0)
    close(effective(handle, W), scattered(p), 1e-12)
    backward(model, randn(9, N, seed=1), randn(9, M, seed=2))
    assert not grad(p.roles()["A"]).any() and grad(p.roles()["values"]).abs().min() > 0


def test_6_the_sum_has_full_rank():
    product_ranks = set()
    for seed in range(50):
        layer = linear(64, 64)
        W = layer.weight.detach().clone()
        _, handle, p = adapted(sltrain(rank=4, density=0.1), layer, seed=seed)
        put(p.roles()["B"], randn(64, 4, seed=seed))
        product_ranks.add(int(torch.linalg.matrix_rank(p.roles()["B"] @ p.roles()["A"])))
        assert int(torch.linalg.matrix_rank(effective(handle, W))) == 64
    assert product_ranks == {4}


@pytest.mark.parametrize("tokens", [5, 70])
def test_7_no_matrix_is_kept_for_backward(tokens):
    model, *_ = build()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = randn(tokens, N, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert kept and not [tuple(t.shape) for t in kept if t.is_floating_point() and t.numel() == M * N]
    y.sum().backward()  # and it can be rebuilt
    assert grad(x).abs().max() > 0


def test_8_training_reaches_a_target_of_its_own_form():
    """By gradients, from a random product; B = 0 with zero values would be no start for this (A has no gradient there)."""
    model, _, p, _, b = build(10, 10, rank=1, density=0.2, generic=False)
    goal = scattered(p, (10, 10)).detach().sign() * 0.7 + randn(10, 1, seed=1) @ randn(1, 10, seed=2)
    optimizer = torch.optim.LBFGS(
        list(p.roles().values()), lr=1, max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    put(p.roles()["B"], randn(10, 1, seed=3))
    eye = torch.eye(10, dtype=torch.float64)

    def loss():
        return (model(eye) - b - goal.t()).square().sum()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    assert float(loss()) > 1
    optimizer.step(closure)
    assert float(loss()) < 1e-8
