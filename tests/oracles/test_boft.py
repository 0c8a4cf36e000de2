"""Oracles of BOFT: W' = diag(s) W Rotᵀ, Rot = F_{N-1} … F_0 with F_i = P_i blockdiag(Cayley((M - Mᵀ)/2)) P_iᵀ: a butterfly."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, central_difference, close, fill, grad, linear, put, randn

boft = rw.catalog.boft
SIZES = [(8, 4, 1), (12, 4, 1), (8, 2, 3), (8, 4, 2), (16, 2, 4), (16, 4, 3), (12, 2, 2)]  # n, block, factors


def order(n, b, level, factors):
    """idx_i: cut into D / 2^i groups; in a group, first the even-numbered pieces of b/2 coordinates, then the odd ones."""
    if factors == 1:
        return list(range(n))
    group = n // (n // b // 2**level)
    result = []
    for first in range(0, n, group):
        pieces = [list(range(k, k + b // 2)) for k in range(first, first + group, b // 2)]
        result += [c for piece in pieces[::2] + pieces[1::2] for c in piece]
    return result


def permutation(n, b, level, factors):
    """P_i, dense: row j picks coordinate idx_j."""
    P = torch.zeros(n, n, dtype=torch.float64)
    for j, c in enumerate(order(n, b, level, factors)):
        P[j, c] = 1
    return P


def cayley(M):
    S, eye = (M - M.t()) / 2, torch.eye(M.shape[0], dtype=M.dtype)
    return (eye - S) @ torch.linalg.inv(eye + S)


def rotation(blocks):
    """Rot, from dense factors."""
    N, D, b, _ = blocks.shape
    Rot = torch.eye(D * b, dtype=blocks.dtype)
    for level in range(N):
        P = permutation(D * b, b, level, N)
        Rot = P @ torch.block_diag(*[cayley(M) for M in blocks[level]]) @ P.t() @ Rot
    return Rot


def begin(m=7, n=8, block=4, factors=1, layer=None, size=1.0):
    model, handle, p = adapted(boft(block=block, factors=factors), layer or linear(m, n))
    fill(handle, size=size)
    return model, handle, p, p.roles()["blocks"], p.roles()["gain"]


def effective(model, handle):
    return model.layer.weight + handle.update_of("layer").dense()


@pytest.mark.parametrize(("n", "block", "factors"), SIZES)
def test_1_by_definition(n, block, factors):
    model, handle, p, blocks, gain = begin(7, n, block, factors)
    D = n // block
    assert blocks.shape == (factors, D, block, block) and gain.shape == (7,)
    assert handle.trained_numbers == factors * D * block**2 + 7
    Rot, x = rotation(blocks.detach()), randn(5, n, seed=1)
    close(p.rotation().dense(), Rot, 1e-10)
    matrix = gain[:, None] * (model.layer.weight @ Rot.t())
    close(effective(model, handle), matrix, 1e-10)
    close(model(x), x @ matrix.t() + model.layer.bias, 1e-10)  # the bias is not scaled


@pytest.mark.filterwarnings("ignore")
def test_1_peft_gives_the_same_for_one_factor():
    peft = pytest.importorskip("peft")
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, boft_dropout=0.0, target_modules=["layer"])
    reference = peft.get_peft_model(One(linear(12, 8)), config).double().eval()
    model, _, _, blocks, gain = begin(12, 8)
    for name, value in (("boft_R", blocks), ("boft_s", gain[:, None])):
        (theirs,) = [tensor for key, tensor in reference.named_parameters() if name in key]
        assert theirs.shape == value.shape
        put(theirs, value)
    x = randn(5, 8, seed=1)
    close(model(x), reference(x), 1e-7)


@pytest.mark.parametrize(("n", "block", "factors"), [(12, 4, 2), (8, 4, 3), (9, 3, 2), (10, 4, 1), (12, 2, 3)])
def test_1_sizes_without_a_butterfly_are_refused(n, block, factors):
    with pytest.raises(rw.RankwiseError):
        adapted(boft(block=block, factors=factors), linear(7, n))


@pytest.mark.parametrize(("n", "block", "factors"), SIZES)
def test_2_orthogonality(n, block, factors):
    model, handle, p, _, gain = begin(7, n, block, factors)
    Rot, W = p.rotation().dense(), model.layer.weight
    close(Rot @ Rot.t(), torch.eye(n, dtype=torch.float64), 1e-6)
    put(gain, 1.0)
    changed = effective(model, handle)
    close(changed @ changed.t(), W @ W.t(), 1e-10)
    assert float((changed - W).norm()) > 0.1 * float(W.norm())


def test_2_start_is_the_base():
    layer, x, g = linear(7, 8), randn(5, 8, seed=1), randn(5, 7, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(boft(block=2, factors=3), layer)
    assert not p.roles()["blocks"].any() and torch.equal(p.roles()["gain"], torch.ones(7, dtype=torch.float64))
    close(model(x), base, 1e-14)
    backward(model, x, g)
    assert all(grad(tensor).any() for tensor in p.roles().values())


def test_3_one_factor_is_oft():
    _, handle, _, blocks, gain = begin(7, 12)
    _, other, q = adapted(rw.catalog.oft(block=4, cayley="exact"), linear(7, 12))
    S = (blocks - blocks.mT).detach()[0]
    put(blocks, S[None])
    put(gain, 1.0)
    rows, columns = torch.triu_indices(4, 4, offset=1)
    put(q.roles()["skew"], S[:, rows, columns])
    close(handle.update_of("layer").dense(), other.update_of("layer").dense(), 1e-10)


@pytest.mark.parametrize(("n", "block", "factors"), [(8, 2, 3), (16, 2, 4), (16, 4, 3), (8, 4, 2)])
def test_4_enough_factors_mix_every_pair_of_coordinates(n, block, factors):
    assert 2 ** (factors - 1) == n // block  # N = log2(D) + 1
    _, _, p, _, _ = begin(7, n, block, factors)
    assert float(p.rotation().dense().abs().min()) > 1e-5
    _, _, q, _, _ = begin(7, n, block, 1)
    kept = torch.block_diag(*[torch.ones(block, block)] * (n // block)).bool()
    single = q.rotation().dense()
    assert not single[~kept].any() and single[kept].all()


@pytest.mark.parametrize(("n", "block", "factors"), SIZES)
def test_5_permutations(n, block, factors):
    _, _, p, _, _ = begin(7, n, block, factors)
    z = randn(3, n, seed=1)
    assert p.permutation.shape == (factors, n)
    for level, idx in enumerate(p.permutation):
        assert idx.tolist() == order(n, block, level, factors)
        assert sorted(idx.tolist()) == list(range(n))
        gathered = z[:, idx]
        assert torch.equal(gathered, z @ permutation(n, block, level, factors).t())  # gathering is P z
        assert torch.equal(torch.zeros_like(z).index_copy(1, idx, gathered), z)


def test_5_no_dense_permutation_is_kept():
    model, *_ = begin(7, 16, 2, 4)
    assert sum(buffer.numel() for buffer in model.buffers()) <= 2 * 4 * 16  # indices (and inverses): not 4 · 16 · 16


def test_6_only_the_skew_part_acts():
    model, handle, _, blocks, _ = begin(7, 8, 2, 3)
    before, H = handle.update_of("layer").dense().detach(), randn(*blocks.shape, seed=3)
    put(blocks, blocks + H + H.mT)
    close(handle.update_of("layer").dense(), before, 1e-10)
    backward(model, randn(5, 8, seed=1), randn(5, 7, seed=2))
    d = grad(blocks)
    close(d + d.mT, torch.zeros_like(d), 1e-12)
    assert d.abs().max() > 1e-3


def test_6_gradient():
    model, _, _, blocks, gain = begin(3, 8, 2, 3)
    W, M, s = model.layer.weight.detach(), blocks.detach().clone(), gain.detach().clone()
    G = backward(model, randn(5, 8, seed=1), randn(5, 3, seed=2))
    numeric = central_difference(lambda value: float((G * (s[:, None] * (W @ rotation(value).t()))).sum()), M)
    close(grad(blocks), numeric, 1e-7)
    close(grad(gain), (G * (W @ rotation(M).t())).sum(1), 1e-10)


def test_7_the_gain_scales_all_but_the_bias():
    model, _, _, _, gain = begin(7, 8, 2, 3)
    x, bias = randn(5, 8, seed=1), model.layer.bias.detach()
    before = model(x).detach()
    put(gain, 2 * gain)
    close(model(x) - bias, 2 * (before - bias), 1e-12)
    put(gain, 0.0)
    assert torch.equal(model(x), bias.expand(5, 7))


def test_7_a_convolution_rotates_its_flat_kernel():
    layer = nn.Conv2d(4, 6, 2, padding=1).double()
    for k, tensor in enumerate(layer.parameters()):
        put(tensor, randn(*tensor.shape, seed=40 + k))
    x = randn(2, 4, 5, 5, seed=1)
    model, _, _, blocks, gain = begin(block=2, factors=4, layer=layer)
    matrix = gain[:, None] * (layer.weight.reshape(6, 16) @ rotation(blocks.detach()).t())
    close(model(x), F.conv2d(x, matrix.reshape(6, 4, 2, 2), layer.bias, padding=1), 1e-10)


def test_7_merging_and_back():
    model, handle, _, _, _ = begin(7, 8, 2, 3)
    x, W = randn(5, 8, seed=1), model.layer.weight.detach().clone()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-10)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
