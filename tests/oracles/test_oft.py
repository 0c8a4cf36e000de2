"""Oracles of OFT: W' = W Dᵀ with D = blockdiag(R_1 … R_k), R_i an orthogonal function of a skew matrix; or W' = D W.

The two forms of R mean opposite rotations: exact, R = (I - Q)(I + Q)⁻¹, and the Neumann series of its transpose.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, central_difference, close, fill, grad, linear, put, randn

oft = rw.catalog.oft
MODES = [("exact", 5), *(("neumann", terms) for terms in (2, 3, 4, 5, 6))]


def skew_matrix(v, b):
    """Q = U - Uᵀ from the strict upper triangle of U, row by row."""
    Q, entries = torch.zeros(b, b, dtype=v.dtype), iter(range(v.numel()))
    for i, j in itertools.combinations(range(b), 2):
        k = next(entries)
        Q[i, j], Q[j, i] = v[k], -v[k]
    return Q


def upper(Q):
    """The inverse of `skew_matrix`."""
    return torch.stack([Q[i, j] for i, j in itertools.combinations(range(Q.shape[0]), 2)])


def cayley(Q):
    eye = torch.eye(Q.shape[0], dtype=Q.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def neumann(Q, terms):
    """I + 2Q + … + 2Q^K + Q^(K+1), K = max(terms - 2, 2); I + 2Q for two terms and I for one."""
    eye = torch.eye(Q.shape[0], dtype=Q.dtype)
    if terms < 3:
        return eye + (terms - 1) * 2 * Q
    K = max(terms - 2, 2)
    return eye + 2 * sum(torch.linalg.matrix_power(Q, k) for k in range(1, K + 1)) + torch.linalg.matrix_power(Q, K + 1)


def rotation(skew, b, mode, terms, count):
    """D, dense."""
    matrices = [skew_matrix(v, b) for v in skew.detach()]
    blocks = [cayley(Q) if mode == "exact" else neumann(Q, terms) for Q in matrices]
    return torch.block_diag(*(blocks * count if len(blocks) == 1 else blocks))


def effective(model, handle):
    return model.layer.weight + handle.update_of("layer").dense()


def begin(m=7, n=12, block=4, size=0.3, layer=None, **options):
    model, handle, p = adapted(oft(block=block, **options), layer or linear(m, n))
    fill(handle, size=size)
    return model, handle, p, p.roles()["skew"]


@pytest.mark.parametrize(("mode", "terms"), [*MODES, ("neumann", 1)])
@pytest.mark.parametrize("side", ["input", "output"])
def test_1_by_definition(mode, terms, side):
    m, n = (7, 12) if side == "input" else (12, 7)
    model, handle, p, skew = begin(m, n, cayley=mode, terms=terms, side=side)
    assert skew.shape == (3, 6) and handle.trained_numbers == 3 * 6
    W, D, x = model.layer.weight, rotation(skew, 4, mode, terms, 3), randn(5, n, seed=1)
    close(torch.block_diag(*p.blocks()), D, 1e-12)
    close(p.rotation().dense(), D, 1e-12)
    matrix = W @ D.t() if side == "input" else D @ W
    close(effective(model, handle), matrix, 1e-12)
    close(model(x), x @ matrix.t() + model.layer.bias, 1e-12)  # the bias stays
    if terms != 1:
        assert float((matrix - W).norm()) > 0.05 * float(W.norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mode", "terms"), MODES)
def test_1_peft_gives_the_same(mode, terms):
    peft = pytest.importorskip("peft")
    form = {"use_cayley_neumann": mode == "neumann", "num_cayley_neumann_terms": terms}
    config = peft.OFTConfig(r=0, oft_block_size=4, module_dropout=0.0, target_modules=["layer"], **form)
    reference = peft.get_peft_model(One(linear(7, 8)), config).double().eval()
    model, _, _, skew = begin(7, 8, cayley=mode, terms=terms)
    (theirs,) = [tensor for key, tensor in reference.named_parameters() if "oft_R" in key]
    put(theirs, skew)
    x = randn(5, 8, seed=1)
    close(model(x), reference(x), 1e-7)


def test_1_three_and_four_terms_coincide():
    updates = [begin(cayley="neumann", terms=terms)[1].update_of("layer").dense() for terms in (3, 4, 5)]
    assert torch.equal(updates[0], updates[1]) and not torch.allclose(updates[1], updates[2])


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_2_the_exact_form_is_a_rotation(side, size):
    model, handle, p, _ = begin(12, 12, cayley="exact", side=side, size=size)
    D, W, changed = p.rotation().dense(), model.layer.weight, effective(model, handle)
    close(D @ D.t(), torch.eye(12, dtype=torch.float64), 1e-10)
    assert float(torch.linalg.det(D)) == pytest.approx(1, abs=1e-9)
    if side == "input":
        close(changed.norm(dim=1), W.norm(dim=1), 1e-10)
        close(changed @ changed.t(), W @ W.t(), 1e-10)
    else:
        close(changed.t() @ changed, W.t() @ W, 1e-10)
    assert float((changed - W).norm()) > 0.1 * float(W.norm())


def test_2_in_float32():
    _, handle, p = adapted(oft(block=4, cayley="exact"), linear(7, 12, dtype=torch.float32))
    fill(handle, size=0.5)
    D = p.rotation().dense()
    close(D @ D.t(), torch.eye(12), 1e-6)


@pytest.mark.parametrize(("terms", "factor"), [(3, 8), (5, 16), (7, 64)])
def test_3_neumann_is_the_transposed_rotation_up_to_its_order(terms, factor):
    _, _, exact, skew = begin(7, 4, cayley="exact")
    _, _, series, other = begin(7, 4, cayley="neumann", terms=terms)
    v, errors = randn(1, 6, seed=3), []
    v = 0.1 * v / torch.linalg.matrix_norm(skew_matrix(v[0], 4), 2)
    for part in (1.0, 0.5):
        put(skew, -part * v)
        put(other, part * v)
        close(exact.rotation().dense(), cayley(skew_matrix(part * v[0], 4)).t(), 1e-12)
        errors.append(float((series.rotation().dense() - exact.rotation().dense()).norm()))
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.05)
    assert errors[0] < 0.02


@pytest.mark.parametrize("mode", ["exact", "neumann"])
def test_4_blocks_of_one_are_the_identity(mode):
    layer, x = linear(7, 5), randn(4, 5, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(oft(block=1, cayley=mode), layer)
    assert handle.trained_numbers == 0
    assert torch.equal(model(x), base) and torch.equal(p.rotation().dense(), torch.eye(5, dtype=torch.float64))


def test_4_one_block_is_a_full_rotation():
    model, handle, _, skew = begin(7, 6, block=6)
    R = torch.linalg.matrix_exp(skew_matrix(randn(15, seed=3) * 0.4, 6))  # any rotation without eigenvalue -1
    eye = torch.eye(6, dtype=torch.float64)
    put(skew, upper((eye - R) @ torch.linalg.inv(eye + R)))
    close(effective(model, handle), model.layer.weight @ R.t(), 1e-10)


def test_4_blocks_commute():
    _, _, p, skew = begin(7, 12)
    whole, values, parts = p.rotation().dense().detach(), skew.detach().clone(), []
    for k in range(3):
        put(skew, torch.zeros_like(values).index_copy(0, torch.tensor([k]), values[k : k + 1]))
        parts.append(p.rotation().dense().detach())
        outside = torch.ones(12, dtype=torch.bool)
        outside[4 * k : 4 * k + 4] = False
        assert torch.equal(parts[k][outside][:, outside], torch.eye(8, dtype=torch.float64))
    for order in itertools.permutations(parts):
        close(order[0] @ order[1] @ order[2], whole, 1e-12)


@pytest.mark.parametrize("mode", ["exact", "neumann"])
def test_5_shared_blocks_are_equal_blocks(mode):
    one, _, p, skew = begin(cayley=mode, share_blocks=True)
    assert skew.shape == (1, 6) and p.blocks().shape == (3, 4, 4)
    two, _, _, rows = begin(cayley=mode)
    put(rows, skew.expand(3, -1))
    x, g = randn(5, 12, seed=1), randn(5, 7, seed=2)
    backward(one, x, g)
    backward(two, x, g)
    close(one(x), two(x), 1e-12)
    close(grad(skew), grad(rows).sum(0, keepdim=True), 1e-12)


def convolution(bias=True, **geometry):
    layer = nn.Conv2d(2, 6, 3, bias=bias, **geometry).double()
    for k, tensor in enumerate(layer.parameters()):
        put(tensor, randn(*tensor.shape, seed=40 + k))
    return layer


def image(seed=1):
    return randn(2, 2, 6, 5, seed=seed)


@pytest.mark.parametrize("mode", ["exact", "neumann"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("conv", [False, True])
def test_6_start_is_the_base_to_the_bit(mode, side, conv):
    layer = convolution(bias=False, padding=1) if conv else linear(6, 18)
    x = image() if conv else randn(5, 18, seed=1)
    base = layer(x).detach()
    model, _, p = adapted(oft(block=3, cayley=mode, side=side), layer)
    assert torch.equal(model(x), base)
    (model(x) * randn(*base.shape, seed=2)).sum().backward()
    assert grad(p.roles()["skew"]).abs().min() > 0


@pytest.mark.parametrize("mode", ["exact", "neumann"])
def test_6_a_convolution_rotates_its_flat_kernel(mode):
    layer = convolution(stride=2, padding=1)
    base = layer(image()).detach()
    close(adapted(oft(block=3, cayley=mode), convolution(stride=2, padding=1))[0](image()), base, 1e-14)
    model, _, _, skew = begin(block=3, cayley=mode, layer=layer)
    D = rotation(skew, 3, mode, 5, 6)
    matrix = (layer.weight.reshape(6, 18) @ D.t()).reshape(6, 2, 3, 3)
    close(model(image()), F.conv2d(image(), matrix, layer.bias, 2, 1), 1e-10)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("modes", [("exact", "exact"), ("exact", "neumann")])
def test_7_merging_two_adapters_equals_the_forward(order, modes):
    layer, x = linear(7, 12), randn(5, 12, seed=1)
    W, model = layer.weight.detach().clone(), One(layer)
    handles = {name: rw.adapt_(model, oft(block=4, cayley=mode), name=name) for name, mode in zip("ab", modes, strict=True)}
    for k, handle in enumerate(handles.values()):
        fill(handle, seed=10 + 7 * k, size=0.3)
    single = []
    for name in "ab":
        rw.activate_(model, name)
        single.append(model(x).detach())
    rw.activate_(model, dict.fromkeys(order, 1.0))
    before = model(x).detach()
    assert all((before - alone).norm() > 0.05 * before.norm() for alone in single)
    for name in order:
        handles[name].merge_()
    close(model(x), before, 1e-10)
    close(F.linear(x, layer.weight, layer.bias), before, 1e-10)
    for name in order:
        handles[name].unmerge_()
    assert torch.equal(layer.weight, W)


def test_8_a_rotation_near_the_identity_comes_back():
    _, _, p, skew = begin(7, 12)
    rotations = [torch.linalg.matrix_exp(skew_matrix(0.3 * randn(6, seed=k), 4)) for k in range(3)]
    eye = torch.eye(4, dtype=torch.float64)
    put(skew, torch.stack([upper((eye - R) @ torch.linalg.inv(eye + R)) for R in rotations]))
    for block, R in zip(p.blocks(), rotations, strict=True):
        close(block, R, 1e-6)


@pytest.mark.parametrize("mode", ["exact", "neumann"])
def test_8_gradient(mode):
    model, _, _, skew = begin(3, 6, block=3, cayley=mode)
    x, g, W = randn(5, 6, seed=1), randn(5, 3, seed=2), model.layer.weight.detach()
    G = backward(model, x, g)
    numeric = central_difference(lambda v: float((G * (W @ rotation(v, 3, mode, 5, 2).t())).sum()), skew.detach())
    close(grad(skew), numeric, 1e-7)


def test_8_the_constraint_projects_what_is_used_and_not_what_is_trained():
    eps, k, eye = 0.6, 3, torch.eye(4, dtype=torch.float64)
    model, _, p, skew = begin(7, 12, constrain=eps)
    values = torch.stack([0.05 * randn(6, seed=1), randn(6, seed=2), 3 * randn(6, seed=3)])
    put(skew, values)
    model.eval()(randn(5, 12, seed=4))
    assert torch.equal(skew, values)
    for block, v in zip(p.blocks(), values, strict=True):
        Q = skew_matrix(v, 4)
        radius = eps / k**0.5
        if Q.norm() > radius:
            Q = Q * radius / Q.norm()
        close((eye - block) @ torch.linalg.inv(eye + block), Q, 1e-10)
