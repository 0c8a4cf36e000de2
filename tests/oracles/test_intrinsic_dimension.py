"""Intrinsic dimension against its spec (arXiv:1804.08838): all weights move as θ₀ + P v with one trained vector v.

P is read off the library column by column, by putting unit vectors in. The published dimensions of networks are not tested.
"""

import itertools

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.lab.intrinsic_dimension import search
from rankwise.parameterizations.intrinsic import Fastfood, walsh_hadamard
from tests.oracles.tools import One, close, grad, linear, put, randn

intrinsic_dimension = rw.catalog.intrinsic_dimension


def sylvester(size):
    """The Walsh-Hadamard matrix by doubling."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def columns(transform, dimension):
    """P (D, d) of a Fastfood transform."""
    eye = torch.eye(dimension, dtype=torch.float64)
    return torch.stack([transform.project(unit) for unit in eye], 1)


def network(*shapes, seed=0):
    return nn.ModuleList([linear(m, n, seed=seed + k, bias=False) for k, (m, n) in enumerate(shapes)])


def adapt(model, dimension, *, seed=0, **options):
    sites = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return rw.adapt_(model, intrinsic_dimension(dimension=dimension, **options), where=sites, seed=seed)


def vector(handle):
    """The trained v, which stands once for all sites."""
    return handle.blocks()["rankwise_banks.default"]["v"]


def updates(handle):
    """θ - θ₀, the sites one after the other."""
    return torch.cat([handle.update_of(site).dense().detach().flatten() for site in handle.targets])


def projection(handle):
    """P (D, d) as the model has it."""
    v, found = vector(handle), []
    kept = v.detach().clone()
    for unit in torch.eye(v.numel(), dtype=torch.float64):
        put(v, unit)
        found.append(updates(handle))
    put(v, kept)
    return torch.stack(found, 1)


def test_1_walsh_hadamard():
    x = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.float64)
    assert torch.equal(walsh_hadamard(x), torch.tensor([4, 2, 0, -2, 0, 2, 0, 2], dtype=torch.float64))
    for size in (1, 2, 4, 8, 16, 32, 64):
        H = sylvester(size)
        eye = torch.eye(size, dtype=torch.float64)
        found = torch.stack([walsh_hadamard(unit) for unit in eye], 1)
        assert torch.equal(found, H)
        close(torch.stack([walsh_hadamard(column) for column in found.t()], 1), size * eye, 1e-15)


@pytest.mark.parametrize("size", [64, 256])
def test_2_columns_have_unit_norm_where_the_size_is_a_power_of_two(size):
    P = columns(Fastfood(size, 20, 0), 20)
    assert P.shape == (size, 20)
    assert float((P.norm(dim=0) - 1).abs().max()) < 1e-12


def test_2_columns_have_unit_norm_in_the_mean_elsewhere():
    squares = torch.stack([columns(Fastfood(200, 20, seed), 20).square().sum(0) for seed in range(6)])
    assert float(squares.mean()) == pytest.approx(1.0, abs=0.03)
    assert float((squares - 1).abs().max()) > 1e-3  # it is cut, so single columns are off


def test_2_columns_are_nearly_orthogonal():
    """Entries off the diagonal of the Gram matrix have a standard deviation of √(3/L)."""
    for seed in range(3):
        P = columns(Fastfood(256, 20, seed), 20)
        off = (P.t() @ P)[~torch.eye(20, dtype=torch.bool)]
        assert float(off.abs().max()) < 5 * (3 / 256) ** 0.5
        assert 0.5 < float(off.square().mean().sqrt()) / (3 / 256) ** 0.5 < 1.6


@pytest.mark.parametrize(("scope", "expected"), [("model", 1.0), ("tensor", 2**0.5)])
def test_2_the_whole_model_or_each_tensor(scope, expected):
    """Global: one transform over all entries. Per tensor: one each with the same v, so norms add up to √(number of tensors)."""
    handle = adapt(network((16, 8), (8, 16)), 20, scope=scope)
    assert float((projection(handle).norm(dim=0) - expected).abs().max()) < 1e-10  # sizes are powers of two here
    uneven = adapt(network((10, 12), (8, 10)), 40, scope=scope)
    assert float(projection(uneven).square().sum(0).mean()) == pytest.approx(expected**2, rel=0.05)


def test_2_fastfood_of_the_model_is_one_transform():
    """P has rank d with all rows different: the second tensor is no copy of the first."""
    for scope in ("model", "tensor"):
        P = projection(adapt(network((8, 8), (8, 8)), 10, scope=scope))
        assert int(torch.linalg.matrix_rank(P)) == 10
        assert float((P[:64] - P[64:]).norm()) > 0.5


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_2_other_projections_are_normalized_over_all_entries(kind):
    P = projection(adapt(network((50, 30), (25, 40)), 30, projection=kind))
    assert float((P.norm(dim=0) - 1).abs().max()) < 1e-12
    share = float((P != 0).double().mean())
    if kind == "dense":
        assert share == 1.0
        Q = P * 2500**0.5  # nearly N(0, 1)
        assert abs(float(Q.mean())) < 0.02 and float((Q**4).mean()) == pytest.approx(3.0, rel=0.1)
    else:
        assert share == pytest.approx(2500**-0.5, rel=0.15)
        for column in P.t():
            sizes = column[column != 0].abs()
            assert float(sizes.max() - sizes.min()) < 1e-12
        assert 0.4 < float((P[P != 0] > 0).double().mean()) < 0.6


@pytest.mark.parametrize(("size", "dimension"), [(64, 10), (200, 20), (1000, 7), (33, 33)])
def test_3_adjoint(size, dimension):
    transform = Fastfood(size, dimension, 3)
    v, g = randn(dimension, seed=1), randn(size, seed=2)
    forward, back = transform.project(v), transform.adjoint(g)
    assert forward.shape == (size,) and back.shape == (dimension,)
    assert float(forward @ g) == pytest.approx(float(v @ back), rel=1e-10)
    close(back, columns(transform, dimension).t() @ g, 1e-10)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_4_gradient_and_one_step(kind, scope):
    """dL/dv = Pᵀ dL/dθ, so one step moves θ by -η P Pᵀ dL/dθ, which is θ's own step where P is orthonormal."""
    model = network((7, 5), (6, 7))
    handle = rw.adapt_(
        model, rw.compose(intrinsic_dimension(dimension=9, projection=kind, scope=scope), "sgd"), where=["0", "1"]
    )
    P, optimizer = projection(handle), handle.optimizer(0.01)
    x, g = randn(8, 5, seed=1), randn(8, 6, seed=2)
    weights = [model[k].weight.detach().clone().requires_grad_() for k in (0, 1)]
    loss = (torch.tanh(x @ weights[0].t()) @ weights[1].t() * g).sum()
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
    (model[1](torch.tanh(model[0](x))) * g).sum().backward()
    close(grad(vector(handle)), P.t() @ gradient, 1e-10)
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    close(updates(handle), -0.01 * P @ (P.t() @ gradient), 1e-10)


@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_4_start_seed_and_count(kind):
    x, base = randn(8, 5, seed=1), network((7, 5), (6, 7))
    models = [network((7, 5), (6, 7)) for _ in range(3)]
    handles = [adapt(model, 9, projection=kind, seed=seed) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert torch.equal(models[0][1](models[0][0](x)), base[1](base[0](x)))
    assert not vector(handles[0]).any() and vector(handles[0]).shape == (9,)
    assert handles[0].trained_numbers == 9
    for handle in handles:
        put(vector(handle), randn(9, seed=4))
    assert torch.equal(updates(handles[0]), updates(handles[1]))
    assert float((updates(handles[0]) - updates(handles[2])).norm()) > 0.5


@pytest.mark.parametrize("kind", ["fastfood", "sparse"])
def test_4_a_checkpoint_knows_the_order_of_the_tensors(kind, tmp_path):
    def build(names):
        return nn.ModuleDict({name: linear(7, 7, seed=ord(name), bias=False) for name in names})

    handle = adapt(build("ab"), 9, projection=kind)
    put(vector(handle), randn(9, seed=4))
    handle.save(tmp_path / "saved")
    expected = {site: handle.update_of(site).dense().detach() for site in "ab"}
    again = rw.load_(build("ab"), tmp_path / "saved")
    assert all(torch.equal(again.update_of(site).dense(), expected[site]) for site in "ab")
    try:
        turned = rw.load_(build("ba"), tmp_path / "saved")
    except rw.RankwiseError:
        return  # refused, so nothing wrong was loaded
    assert all(torch.equal(turned.update_of(site).dense(), expected[site]) for site in "ab")


def test_5_quadratic():
    layer = linear(6, 4, bias=False)
    theta0 = layer.weight.detach().clone().flatten()
    root, target = randn(24, 24, seed=5), randn(24, seed=6)
    H = root @ root.t() / 24 + torch.eye(24, dtype=torch.float64)
    model = One(layer)
    handle = adapt(model, 7)
    P, v, eye = projection(handle), vector(handle), torch.eye(4, dtype=torch.float64)
    best = torch.linalg.solve(P.t() @ H @ P, P.t() @ (target - H @ theta0))
    # No line search: one compares losses, which are equal to the last bit at a distance of 3e-8. Gradients alone reach 4e-14.
    optimizer = torch.optim.LBFGS([v], lr=1, max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        theta = model(eye).t().reshape(-1)
        loss = 0.5 * theta @ H @ theta - target @ theta
        loss.backward()
        return loss

    optimizer.step(closure)
    close(v.detach(), best, 1e-8)
    close(updates(handle), P @ best, 1e-8)
    reached = []
    for d in range(1, 8):  # nested subspaces of growing dimension
        Q = P[:, :d]
        theta = theta0 + Q @ torch.linalg.solve(Q.t() @ H @ Q, Q.t() @ (target - H @ theta0))
        reached.append(float(0.5 * theta @ H @ theta - target @ theta))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(reached))
    theta = model(eye).detach().t().reshape(-1)
    assert float(0.5 * theta @ H @ theta - target @ theta) == pytest.approx(reached[-1], rel=1e-10)


SUMS = torch.kron(torch.eye(10, dtype=torch.float64), torch.ones(1, 100, dtype=torch.float64))  # ten groups of 100 numbers
WANTED = torch.arange(1, 11, dtype=torch.float64)


def residual(dimension, seed=0):
    """What is left of the task "the ten sums are 1 … 10" in a subspace, from θ₀ = 0."""
    A = SUMS @ columns(Fastfood(1000, dimension, seed), dimension)  # (10, d)
    solution = torch.linalg.lstsq(A, WANTED).solution
    return float((A @ solution - WANTED).norm())


@pytest.mark.parametrize("seed", [0, 1])
def test_6_a_task_of_ten_equations_has_dimension_ten(seed):
    assert residual(10, seed) < 1e-9
    assert residual(9, seed) > 1e-3


def test_6_the_search_finds_it():
    asked = []

    def score(dimension):
        asked.append(dimension)
        return 1.0 - residual(dimension) / float(WANTED.norm())

    found = search(score, (2, 5, 8, 9, 10, 12, 20), 1 - 1e-8)
    assert getattr(found, "dimension", found) == 10
    assert set(asked) <= {2, 5, 8, 9, 10, 12, 20}


def test_6_the_adapter_solves_it():
    layer = nn.Linear(1000, 1, bias=False).double()
    put(layer.weight, 0.0)
    model = One(layer)
    handle = adapt(model, 10)
    P = projection(handle)
    put(vector(handle), torch.linalg.solve(SUMS @ P, WANTED))
    assert float((model(SUMS).flatten() - WANTED).norm()) < 1e-9


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_gains_scale_each_tensor_by_itself(scope):
    """SAID: θ_l = θ₀_l + λ_l (P v)_l with a trained λ_l per tensor."""
    model, plain = network((7, 5), (6, 7)), network((7, 5), (6, 7))
    handle, other = adapt(model, 9, scope=scope, gains=True), adapt(plain, 9, scope=scope)
    x, base = randn(8, 5, seed=1), network((7, 5), (6, 7))
    assert torch.equal(model[1](model[0](x)), base[1](base[0](x)))
    v = vector(handle)
    put(v, randn(*v.shape, seed=4))
    gains = [handle.parameterization(site).roles()["gain"] for site in ("0", "1")]
    assert all(gain.shape == () and float(gain.detach()) != 0 for gain in gains)  # with zero, v would have no gradient
    before = [handle.update_of(site).dense().detach() for site in ("0", "1")]
    for gain, factor in zip(gains, (2.0, -3.0), strict=True):
        put(gain, factor * gain)
    close(handle.update_of("0").dense(), 2 * before[0], 1e-12)
    close(handle.update_of("1").dense(), -3 * before[1], 1e-12)
    if v.shape == vector(other).shape:  # the projections are those without gains
        put(vector(other), v)
        close(handle.update_of("0").dense() / gains[0], other.update_of("0").dense(), 1e-12)
    g = randn(8, 6, seed=2)
    weights = [(model[k].weight + handle.update_of(str(k)).dense()).detach().requires_grad_() for k in (0, 1)]
    G = torch.autograd.grad((x @ weights[0].t() @ weights[1].t() * g).sum(), weights)
    (model[1](model[0](x)) * g).sum().backward()
    for gain, gradient, site in zip(gains, G, ("0", "1"), strict=True):
        close(grad(gain), (gradient * handle.update_of(site).dense().detach()).sum() / gain.detach(), 1e-10)


def test_export_is_exact_and_of_full_rank():
    model = One(linear(8, 6, bias=False))
    W, x = model.layer.weight.detach().clone(), randn(5, 6, seed=1)
    handle = adapt(model, 1)
    put(vector(handle), 2.0)
    update = handle.update_of("layer").dense().detach()
    assert int(torch.linalg.matrix_rank(update)) == 6  # even with one trained number
    before = model(x).detach()
    handle.merge_()
    close(model.layer.weight, W + update, 1e-12)
    close(model(x), before, 1e-12)
