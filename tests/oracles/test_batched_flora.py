"""Oracles of Fast LoRA: W_i = W ∘ (B_i A_i), an adapter per example, multiplied into W; one pass serves mixed batches.

Oracle 6, when it is faster than batched LoRA, is about measured times and is left to the benchmark.
"""

import pytest
import torch

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, close, fill, grad, linear, put, randn

batched_flora = rw.catalog.batched_flora
M, N, R = 6, 5, 3
ROWS = [["a", "b", "c", "a"], ["c", "c", "c", "c"], ["b", "a", "c", "b"]]


def several(rank=R, seed=0, **options):
    """A model with adapters a, b and c: (model, W, b, name -> (B, A))."""
    model, factors = One(linear(M, N, seed=seed)), {}
    W, bias = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    for k, name in enumerate("abc"):
        handle = rw.adapt_(model, batched_flora(rank=rank, **options), name=name)
        fill(handle, seed=30 + 17 * k)
        roles = handle.parameterization("layer").roles()
        factors[name] = (roles["B"], roles["A"])
    return model, W, bias, factors


def looped(x, rows, W, bias, factors):
    """Example by example, with explicit matrices."""
    parts = []
    for k, name in enumerate(rows):
        B, A = factors[name]
        parts.append(x[k] @ (W * (B @ A)).t() + bias)
    return torch.stack(parts)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tokens", [None, 3])
def test_1_a_batch_is_a_loop(rows, tokens):
    model, W, bias, factors = several()
    x = randn(*((4, N) if tokens is None else (4, tokens, N)), seed=1)
    rw.activate_(model, rows)
    close(model(x), looped(x, rows, W, bias, factors), 1e-12)


def test_1_one_adapter_for_all():
    model, W, bias, factors = several()
    x = randn(4, N, seed=1)
    for name, (B, A) in factors.items():
        rw.activate_(model, name)
        close(model(x), x @ (W * (B @ A)).t() + bias, 1e-12)


def test_1_the_vectorized_identity():
    # y = Σ_k B[:, k] ∘ (W (A[k] ∘ x)), the way to run it as dense products
    model, W, bias, factors = several()
    x, rows = randn(4, N, seed=1), ROWS[0]
    total = bias.expand(4, M)
    for k in range(R):
        Ak = torch.stack([factors[name][1][k] for name in rows])
        Bk = torch.stack([factors[name][0][:, k] for name in rows])
        total = total + Bk * ((Ak * x) @ W.t())
    rw.activate_(model, rows)
    close(model(x), total, 1e-12)


def test_1_examples_do_not_meet():
    model, *_, factors = several()
    x, rows, order = randn(4, N, seed=1), ROWS[0], [2, 0, 3, 1]
    rw.activate_(model, rows)
    before = model(x).detach()
    rw.activate_(model, [rows[k] for k in order])
    close(model(x[order]), before[order], 1e-12)
    rw.activate_(model, rows)
    put(factors["b"][0], randn(M, R, seed=9))
    after = model(x).detach()
    close(after[[0, 2, 3]], before[[0, 2, 3]], 1e-14)
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rank", [1, 3])
def test_2_starts_as_a_matrix_of_ones(dtype, tolerance, rank):
    layer, x, g = linear(M, N, dtype=dtype), randn(4, N, seed=1, dtype=dtype), randn(4, M, seed=2, dtype=dtype)
    base = layer(x).detach()
    model, handle, p = adapted(batched_flora(rank=rank), layer)
    B, A = p.roles()["B"], p.roles()["A"]
    assert B.shape == (M, rank) and A.shape == (rank, N) and handle.trained_numbers == rank * (M + N)
    close(B @ A, torch.ones(M, N, dtype=dtype), tolerance)
    close(model(x), base, tolerance)
    (model(x) * g).sum().backward()
    assert all(grad(tensor).any() for tensor in (B, A))
    if rank > 1:  # not all components may be dead
        assert (grad(B)[:, 1:].abs().sum() + grad(A)[1:].abs().sum()) > 0


def test_2_it_leaves_the_base_where_the_product_is_not_one():
    _, handle, p = adapted(batched_flora(rank=2), linear(M, N))
    fill(handle)
    W, (B, A) = linear(M, N).weight, (p.roles()["B"], p.roles()["A"])
    close(handle.update_of("layer").dense(), W * (B @ A) - W, 1e-12)


def test_3_gradients_of_a_mixed_batch():
    model, W, _, factors = several()
    rows, x, g = ["a", "c", "a", "a"], randn(4, N, seed=1), randn(4, M, seed=2)
    rw.activate_(model, rows)
    model.zero_grad()
    (model(x) * g).sum().backward()
    for name in ("a", "c"):
        B, A = factors[name]
        chosen = [k for k, row in enumerate(rows) if row == name]
        dB = sum((W * torch.outer(g[k], x[k])) @ A.t() for k in chosen)
        dA = sum(B.t() @ (W * torch.outer(g[k], x[k])) for k in chosen)
        close(grad(B), dB, 1e-12)
        close(grad(A), dA, 1e-12)
    for tensor in factors["b"]:
        assert tensor.grad is None or not tensor.grad.any()


def test_3_gradient_of_the_input():
    model, W, _, factors = several()
    rows, g = ROWS[0], randn(4, M, seed=2)
    x = randn(4, N, seed=1).requires_grad_()
    rw.activate_(model, rows)
    (model(x) * g).sum().backward()
    expected = torch.stack([g[k] @ (W * (factors[name][0] @ factors[name][1])) for k, name in enumerate(rows)])
    close(grad(x), expected, 1e-12)


def test_4_rank_one_scales_rows_and_columns():
    model, W, bias, factors = several(rank=1)
    x = randn(4, N, seed=1)
    rw.activate_(model, "a")
    B, A = factors["a"]
    matrix = torch.diag(B[:, 0]) @ W @ torch.diag(A[0])
    close(model(x), x @ matrix.t() + bias, 1e-12)


def test_4_merging_and_back():
    model, handle, p = adapted(batched_flora(rank=2), linear(M, N))
    fill(handle)
    x, W = randn(4, N, seed=1), linear(M, N).weight
    before = model(x).detach()
    handle.merge_()
    close(model.layer.weight, W * (p.roles()["B"] @ p.roles()["A"]), 1e-12)
    close(model(x), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)


def test_4_gauge():
    model, *_, factors = several()
    x, rows, gauge = randn(4, N, seed=1), ROWS[0], randn(R, R, seed=3)
    rw.activate_(model, rows)
    before = model(x).detach()
    B, A = factors["a"]
    put(B, B @ gauge)
    put(A, torch.linalg.solve(gauge, A))
    close(model(x), before, 1e-10)


def test_4_rank_of_the_change_and_fixed_zeros():
    layer = linear(M, N)
    put(layer.weight, torch.outer(randn(M, seed=3), randn(N, seed=4)) * (torch.arange(N) != 2))
    W = layer.weight.detach().clone()
    _, handle, _ = adapted(batched_flora(rank=2), layer)
    fill(handle)
    changed = W + handle.update_of("layer").dense()
    S = torch.linalg.svdvals(changed)  # rank(W ∘ B A) <= r · rank(W)
    assert S[1] > 1e-6 * S[0] and S[2] < 1e-12 * S[0]
    assert not changed[:, 2].any()  # what is zero stays zero


def test_5_linear_in_the_product():
    model, _, bias, factors = several()
    x, rows = randn(4, N, seed=1), ROWS[0]
    rw.activate_(model, rows)
    before = model(x).detach()
    for B, _ in factors.values():
        put(B, 2 * B)
    close(model(x) - bias, 2 * (before - bias), 1e-12)


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_5_the_residual_mode_adds_the_product(alpha):
    layer, x = linear(M, N), randn(4, N, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(batched_flora(rank=R, mode="residual", alpha=alpha), layer)
    close(model(x), base, 1e-14)
    backward(model, x, randn(4, M, seed=2))
    assert any(grad(tensor).any() for tensor in p.roles().values())
    fill(handle)
    change = alpha / R * layer.weight * (p.roles()["B"] @ p.roles()["A"])
    close(handle.update_of("layer").dense(), change, 1e-12)
    close(model(x), base + x @ change.t(), 1e-12)
