"""Oracles of PMSS: W' = W + s·C U R with r columns C = W[:, J] and rows R = W[I, :] of the weight frozen, U (r, r) trained.

The order of `column_index` and `row_index` is the order of choice. The cost oracle is tested by counters.
"""

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, close, fill, grad, linear, put, randn

pmss = rw.catalog.pmss
RULES = ["qr", "norm", "leverage", "deim", "random"]


def build(W, **options):
    """(model, handle, parameterization, core) on a layer with this weight."""
    layer = linear(*W.shape)
    put(layer.weight, W)
    model, handle, p = adapted(pmss(**options), layer)
    return model, handle, p, p.roles()["core"]


def greedy(matrix, count):
    """Column-pivoted QR by hand: again and again the column with the largest residual, which is then projected out."""
    rest, chosen = matrix.clone(), []
    for _ in range(count):
        column = int(rest.norm(dim=0).argmax())
        chosen.append(column)
        unit = rest[:, column] / rest[:, column].norm()
        rest = rest - torch.outer(unit, unit @ rest)
        rest[:, chosen] = 0.0  # rounding must not bring a column back
    return chosen


def deim(vectors):
    """The points of discrete empirical interpolation of orthonormal columns (n, r)."""
    chosen = [int(vectors[:, 0].abs().argmax())]
    for k in range(1, vectors.shape[1]):
        weights = torch.linalg.solve(vectors[chosen, :k], vectors[chosen, k])
        chosen.append(int((vectors[:, k] - vectors[:, :k] @ weights).abs().argmax()))
    return chosen


@pytest.mark.parametrize("select", RULES)
def test_1_counts_start_and_first_gradient(select):
    W, x, g, r = randn(12, 9, seed=1), randn(11, 9, seed=2), randn(11, 12, seed=3), 4
    model, handle, p, core = build(W, rank=r, select=select, scale=1.5)
    assert handle.trained_numbers == r**2
    # what is stored: the core and 2r integers, since C and R are read off the weight again
    assert sum(tensor.numel() for tensor in p.state_dict().values()) == r**2 + 2 * r
    assert torch.equal(p.C, W[:, p.column_index]) and torch.equal(p.R, W[p.row_index])
    assert torch.equal(core, torch.zeros(r, r, dtype=DOUBLE))
    assert torch.equal(model(x), F.linear(x, W, model.layer.bias))
    G = backward(model, x, g)
    close(grad(core), 1.5 * p.C.t() @ G @ p.R.t(), 1e-12)
    assert grad(core).abs().min() > 0


@pytest.mark.parametrize("select", RULES)
def test_2_skeletons_of_a_low_rank_weight_reproduce_it(select):
    W = randn(12, 3, seed=1) @ randn(3, 9, seed=2)
    _, handle, p, core = build(W, rank=4, select=select)
    assert len(set(p.row_index.tolist())) == len(set(p.column_index.tolist())) == 4  # without replacement
    put(core, torch.linalg.pinv(p.C, rtol=1e-10) @ W @ torch.linalg.pinv(p.R, rtol=1e-10))
    close(handle.update_of("layer").dense(), W, 1e-8)


def test_2_with_as_many_skeletons_as_the_rank_the_core_is_an_inverse():
    W = randn(12, 3, seed=1) @ randn(3, 9, seed=2)
    _, handle, p, core = build(W, rank=3)
    put(core, torch.linalg.inv(W[p.row_index][:, p.column_index]))
    close(handle.update_of("layer").dense(), W, 1e-8)


def test_3_qr_is_the_greedy_choice_in_its_order():
    scales = torch.logspace(0, -2, 9, dtype=DOUBLE)[torch.tensor([4, 1, 7, 0, 8, 2, 5, 3, 6])]
    W = randn(12, 9, seed=1) * scales
    _, _, p, _ = build(W, rank=5)
    assert p.column_index.tolist() == greedy(W, 5)
    assert p.column_index[0] == W.norm(dim=0).argmax()
    assert p.row_index.tolist() == greedy(W.t(), 5)


def test_3_qr_is_not_the_choice_of_largest_norms():
    W = randn(12, 9, seed=1)
    W[:, 0] = 10 * W[:, 3]  # nearly the same direction twice: after the first, the second has nothing left to give
    W[:, 1] = 9 * W[:, 3] + 1e-3 * W[:, 1]
    _, _, p, _ = build(W, rank=3)
    assert p.column_index.tolist() == greedy(W, 3)
    assert p.column_index[0] == 0 and 1 not in p.column_index


@pytest.mark.parametrize("select", ["qr", "norm", "leverage", "deim"])
def test_3_permuting_rows_permutes_the_chosen_rows(select):
    W, order, U = randn(12, 9, seed=1), torch.randperm(12, generator=torch.Generator().manual_seed(2)), randn(4, 4, seed=3)
    _, handle, p, core = build(W, rank=4, select=select)
    _, other, q, other_core = build(W[order], rank=4, select=select)
    assert order[q.row_index].tolist() == p.row_index.tolist()
    assert q.column_index.tolist() == p.column_index.tolist()
    put(core, U)
    put(other_core, U)
    values = [torch.linalg.svdvals(h.update_of("layer").dense().detach()) for h in (handle, other)]
    close(values[1], values[0], 1e-10)


def test_3_the_other_rules():
    W, r = randn(12, 9, seed=1), 4
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = {
        "norm": (W.norm(dim=1).topk(r).indices.tolist(), W.norm(dim=0).topk(r).indices.tolist()),
        "leverage": (
            U[:, :r].square().sum(1).topk(r).indices.tolist(),
            Vh[:r].square().sum(0).topk(r).indices.tolist(),
        ),
        "deim": (deim(U[:, :r]), deim(Vh[:r].t())),
    }
    for select, (rows, columns) in expected.items():
        _, _, p, _ = build(W, rank=r, select=select)
        assert set(p.row_index.tolist()) == set(rows) and set(p.column_index.tolist()) == set(columns), select
    assert len({tuple(sorted(rows)) for rows, _ in expected.values()}) > 1  # the rules do differ here


def test_3_random_choice_depends_on_the_seed():
    W, chosen = randn(30, 20, seed=1), []
    for seed in (0, 0, 1):
        layer = linear(30, 20)
        put(layer.weight, W)
        _, _, p = adapted(pmss(rank=8, select="random"), layer, seed=seed)
        chosen.append((p.row_index.tolist(), p.column_index.tolist()))
    assert chosen[0] == chosen[1] and chosen[0] != chosen[2]


@pytest.mark.parametrize("rescale", [False, True])
def test_4_spaces_and_rank(rescale):
    W = randn(12, 9, seed=1)
    _, handle, p, _ = build(W, rank=4, rescale=rescale)
    fill(handle)
    delta, C, R = handle.update_of("layer").dense().detach(), W[:, p.column_index], W[p.row_index]
    assert (delta - C @ torch.linalg.pinv(C) @ delta).norm() < 1e-6 * delta.norm()
    assert (delta - delta @ torch.linalg.pinv(R) @ R).norm() < 1e-6 * delta.norm()
    assert torch.linalg.matrix_rank(delta, rtol=1e-10) == 4


def test_5_all_rows_and_columns_reach_everything():
    W, D = randn(6, 6, seed=1), randn(6, 6, seed=2)
    _, handle, p, core = build(W, rank=6)
    put(core, torch.linalg.inv(p.C) @ D @ torch.linalg.inv(p.R))
    close(handle.update_of("layer").dense(), D, 1e-9)


def test_rescaling_divides_by_the_spectral_norms():
    W, x, s = randn(12, 9, seed=1), randn(7, 9, seed=2), 0.5
    model, handle, p, core = build(W, rank=4, rescale=True, scale=s)
    fill(handle)
    C, R = W[:, p.column_index], W[p.row_index]
    delta = s * (C / torch.linalg.matrix_norm(C, 2)) @ core.detach() @ (R / torch.linalg.matrix_norm(R, 2))
    close(handle.update_of("layer").dense(), delta, 1e-12)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)


def test_merging_does_not_move_the_skeletons():
    # C and R as views into W would change under the adapter when W is written.
    W, x = randn(12, 9, seed=1), randn(7, 9, seed=2)
    model, handle, p, core = build(W, rank=4)
    fill(handle)
    before, C, R = model(x).detach(), p.C.clone(), p.R.clone()
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank == 4
    close(pair.dense(), C @ core.detach() @ R, 1e-12)
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    assert torch.equal(p.C, C) and torch.equal(p.R, R)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
    close(model(x), before, 1e-12)


def test_indices_are_stored_and_read_back(tmp_path):
    W, x = randn(12, 9, seed=1), randn(7, 9, seed=2)
    model, handle, p, _ = build(W, rank=4, select="random")
    fill(handle)
    handle.save(tmp_path / "saved")
    fresh = type(model)(linear(12, 9))
    put(fresh.layer.weight, W)
    again = rw.load_(fresh, tmp_path / "saved")
    q = again.parameterization("layer")
    assert torch.equal(q.row_index, p.row_index) and torch.equal(q.column_index, p.column_index)
    close(fresh(x), model(x), 1e-12)
