"""DoTA against its spec (arXiv:2412.20891): W' = W + MPO(T) - MPO(T⁰), T⁰ a truncated tensor-train operator of W itself.

The quantized form (QDoTA) and the comparisons between tasks are not tested.
"""

import itertools
import math

import pytest
import torch

import rankwise as rw
from tests.oracles.tools import adapted, backward, central_difference, close, fill, grad, linear, put, randn

dota = rw.catalog.dota
ROWS, COLUMNS = (2, 3, 4), (5, 2, 3)
M, N = math.prod(ROWS), math.prod(COLUMNS)


def build(m=M, n=N, *, rank=3, rows=ROWS, columns=COLUMNS, generic=False, **options):
    """(model, handle, parameterization, W, b)."""
    layer = linear(m, n)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    model, handle, p = adapted(dota(rank=rank, row_factors=rows, column_factors=columns, **options), layer)
    if generic:
        fill(handle, size=0.5)
    return model, handle, p, W, b


def cores(p, name="core"):
    count = len(p.roles())
    return [p.roles()[f"core_{k}"] if name == "core" else getattr(p, f"start_{k}") for k in range(1, count + 1)]


def product(tensors):
    """MPO(T)[i_1..i_N, j_1..j_N] = T_1[i_1, j_1] T_2[i_2, j_2] …, the indices written out."""
    rows, columns = (math.prod(core.shape[axis] for core in tensors) for axis in (1, 2))
    pattern = {2: "aipb,bjqc->ijpq", 3: "aipb,bjqc,ckrd->ijkpqr"}[len(tensors)]
    return torch.einsum(pattern, *tensors).reshape(rows, columns)


def test_1_an_entry_is_a_product_of_small_matrices():
    _, _, p, W, _ = build(rank=12)
    whole = W.reshape(*ROWS, *COLUMNS)
    first, second, third = cores(p)
    for i, j, k, a, b, c in itertools.islice(itertools.product(*map(range, ROWS + COLUMNS)), 0, None, 37):
        entry = first[:, i, a] @ second[:, j, b] @ third[:, k, c]
        close(entry.detach().squeeze(), whole[i, j, k, a, b, c], 1e-10)


def unfolding(W, k, rows=ROWS, columns=COLUMNS):
    """W with the first k pairs (i, j) as rows and the others as columns."""
    count = len(rows)
    tensor = W.reshape(*rows, *columns)
    order = [axis for pair in zip(range(count), range(count, 2 * count), strict=True) for axis in pair]
    left = math.prod(rows[:k]) * math.prod(columns[:k])
    return tensor.permute(order).reshape(left, -1)


@pytest.mark.parametrize("balanced", [False, True])
def test_1_full_bonds_give_the_weight(balanced):
    _, handle, p, W, _ = build(rank=12, balanced=balanced)
    assert [tuple(core.shape) for core in cores(p)] == [(1, 2, 5, 10), (10, 3, 2, 12), (12, 4, 3, 1)]
    assert handle.trained_numbers == 964
    close(product(cores(p)).detach(), W, 1e-12)
    close(product(cores(p, "start")), W, 1e-12)


def test_1_counts_with_bonds_clipped_at_both_ends():
    _, handle, p, _, _ = build(rank=8)
    assert [tuple(core.shape) for core in cores(p)] == [(1, 2, 5, 8), (8, 3, 2, 8), (8, 4, 3, 1)]
    assert handle.trained_numbers == 560


@pytest.mark.parametrize(("m", "n"), [(64, 27), (8, 64)])
def test_1_factors_left_open_are_as_equal_as_possible(m, n):
    _, _, p, _, _ = build(m, n, rank=2, rows=None, columns=None)
    sides = {8: 2, 27: 3, 64: 4}
    assert [core.shape[1] for core in cores(p)] == [sides[m]] * 3
    assert [core.shape[2] for core in cores(p)] == [sides[n]] * 3


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_2_first_output_is_the_base(rank, balanced):
    layer, x = linear(M, N), randn(7, N, seed=1)
    base = layer(x).detach()
    model, handle, p, W, _ = build(rank=rank, balanced=balanced)
    assert float((model(x) - base).norm() / base.norm()) <= 1e-6
    assert float(handle.update_of("layer").dense().norm() / W.norm()) <= 1e-6
    for core, start in zip(cores(p), cores(p, "start"), strict=True):
        assert torch.equal(core, start) and not start.requires_grad
    assert product(cores(p)).norm() > 0.1 * W.norm()


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 9])
def test_3_the_truncation_is_within_its_bounds(rank):
    _, _, p, W, _ = build(rank=rank)
    error = float((W - product(cores(p)).detach()).square().sum())
    tails = [float(torch.linalg.svdvals(unfolding(W, k))[rank:].square().sum()) for k in (1, 2)]
    assert max(tails) * (1 - 1e-10) <= error <= sum(tails) * (1 + 1e-10)
    close(product(cores(p)).detach(), by_sequential_svd(W, rank), 1e-10)


def by_sequential_svd(W, rank):
    """The algorithm of the spec, in the left-canonical gauge."""
    rest, tensors, bond = unfolding(W, 1), [], 1
    for k in range(2):
        U, S, Vh = torch.linalg.svd(rest.reshape(bond * ROWS[k] * COLUMNS[k], -1), full_matrices=False)
        kept = min(rank, len(S))
        tensors.append(U[:, :kept].reshape(bond, ROWS[k], COLUMNS[k], kept))
        rest, bond = S[:kept, None] * Vh[:kept], kept
    return product([*tensors, rest.reshape(bond, ROWS[2], COLUMNS[2], 1)])


def test_3_all_but_the_last_core_are_orthonormal():
    _, _, p, _, _ = build(rank=5)
    for core in cores(p)[:-1]:
        flat = core.detach().reshape(-1, core.shape[-1])
        close(flat.t() @ flat, torch.eye(core.shape[-1], dtype=torch.float64), 1e-12)
    _, _, balanced, _, _ = build(rank=12, balanced=True)
    _, _, plain, _, _ = build(rank=12)
    close(product(cores(balanced)).detach(), product(cores(plain)).detach(), 1e-12)
    spread = [max(core.norm() for core in cores(q)) / min(core.norm() for core in cores(q)) for q in (balanced, plain)]
    assert spread[0] < spread[1]  # √S on both sides of a bond evens the sizes out


@pytest.mark.parametrize(("m", "n"), [(9, 7), (6, 8)])
def test_4_two_factors_are_the_svd(m, n):
    model, handle, p, W, b = build(m, n, rank=3, rows=(m, 1), columns=(1, n))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    close(product(cores(p)).detach(), (U[:, :3] * S[:3]) @ Vh[:3], 1e-12)
    fill(handle)
    first, last = cores(p)  # (1, m, 1, r) and (r, 1, n, 1): PiSSA with B = T_1, A = T_2
    B, A = first.reshape(m, 3), last.reshape(3, n)
    W_res, x = W - (U[:, :3] * S[:3]) @ Vh[:3], randn(5, n, seed=1)
    close(model(x), x @ (W_res + B @ A).t() + b, 1e-12)


def test_5_bond_one_is_a_kronecker_product():
    _, handle, p, _, _ = build(rank=1, generic=True)
    factors = [core[0, :, :, 0] for core in cores(p)]
    expected = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    start = [core[0, :, :, 0] for core in cores(p, "start")]
    close(handle.update_of("layer").dense(), expected - torch.kron(torch.kron(start[0], start[1]), start[2]), 1e-12)
    ranks = [int(torch.linalg.matrix_rank(factor)) for factor in factors]
    assert int(torch.linalg.matrix_rank(expected)) == math.prod(ranks) == 2 * 2 * 3


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_6_core_by_core_is_the_dense_matrix(rank, shape):
    model, handle, p, W, b = build(rank=rank, generic=True)
    x = randn(*shape, N, seed=1)
    delta = product(cores(p)) - product(cores(p, "start"))
    close(handle.update_of("layer").dense(), delta, 1e-10)
    close(model(x), x @ (W + delta).t() + b, 1e-10)


def test_6_gauge():
    model, _, p, _, _ = build(rank=3, generic=True)
    x, P = randn(6, N, seed=1), randn(3, 3, seed=2)
    before = model(x).detach()
    first, second = cores(p)[:2]
    put(first, torch.einsum("aijb,bc->aijc", first, P))
    put(second, torch.einsum("ab,bijc->aijc", torch.linalg.inv(P), second))
    close(model(x), before, 1e-10)


def test_6_gradients():
    model, _, p, _, _ = build(4, 6, rank=2, rows=(2, 2), columns=(3, 2), generic=True)
    x, g = randn(5, 6, seed=1), randn(5, 4, seed=2)
    G = backward(model, x, g)
    current = [core.detach().clone(memory_format=torch.contiguous_format) for core in cores(p)]
    for k, core in enumerate(cores(p)):

        def value(tensor, k=k):
            return float((product([*current[:k], tensor, *current[k + 1 :]]) * G).sum())

        close(grad(core), central_difference(value, current[k]), 1e-6)
    tensors = [core.clone().requires_grad_() for core in current]
    for core, expected in zip(cores(p), torch.autograd.grad((product(tensors) * G).sum(), tensors), strict=True):
        close(grad(core), expected, 1e-12)


def test_merge_writes_the_residual_and_the_cores():
    model, handle, p, W, _ = build(rank=3, generic=True)
    x = randn(6, N, seed=1)
    before = model(x).detach()
    handle.merge_()
    close(model.layer.weight, W - product(cores(p, "start")) + product(cores(p)), 1e-12)
    close(model(x), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
