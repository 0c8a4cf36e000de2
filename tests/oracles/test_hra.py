"""Oracles of HRA: W' = W H with H a chain of r Householder reflections, or H = I - 2 Q Qᵀ after Gram-Schmidt.

An odd number of reflections, and Gram-Schmidt, cannot start at W' = W; their trained tensors are set before they are used.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, central_difference, close, fill, grad, linear, put, randn

hra = rw.catalog.hra


def chain(U):
    """(I - 2 û_1 û_1ᵀ)(I - 2 û_2 û_2ᵀ) … , one after the other."""
    H = torch.eye(U.shape[0], dtype=U.dtype)
    for u in U.t():
        H = H - 2 * torch.outer(H @ u, u) / (u @ u)
    return H


def orthogonalized(U):
    """I - 2 Q Qᵀ with Q from Gram-Schmidt on the columns."""
    columns = []
    for u in U.t():
        for q in columns:
            u = u - (q @ u) * q
        columns.append(u / u.norm())
    Q = torch.stack(columns, 1)
    return torch.eye(U.shape[0], dtype=U.dtype) - 2 * Q @ Q.t()


def begin(m=12, n=8, rank=4, gram_schmidt=False, layer=None):
    start = "random" if rank % 2 or gram_schmidt else "paired"  # away from the base only where that is said
    model, handle, p = adapted(hra(rank=rank, gram_schmidt=gram_schmidt, start=start), layer or linear(m, n))
    fill(handle)
    return model, handle, p, p.roles()["U"]


def effective(model, handle):
    return model.layer.weight + handle.update_of("layer").dense()


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
def test_1_by_definition(rank, gram_schmidt):
    model, handle, p, U = begin(rank=rank, gram_schmidt=gram_schmidt)
    assert U.shape == (8, rank) and handle.trained_numbers == 8 * rank
    H, x = (orthogonalized if gram_schmidt else chain)(U.detach()), randn(5, 8, seed=1)
    close(p.rotation().dense(), H, 1e-10)
    close(effective(model, handle), model.layer.weight @ H, 1e-10)
    close(model(x), x @ (model.layer.weight @ H).t() + model.layer.bias, 1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_1_peft_gives_the_same(gram_schmidt):
    peft = pytest.importorskip("peft")
    config = peft.HRAConfig(r=4, apply_GS=gram_schmidt, target_modules=["layer"])
    reference = peft.get_peft_model(One(linear(12, 8)), config).double().eval()
    model, _, _, U = begin(gram_schmidt=gram_schmidt)
    (theirs,) = [tensor for key, tensor in reference.named_parameters() if "hra_u" in key]
    put(theirs, U)
    x = randn(5, 8, seed=1)
    close(model(x), reference(x), 1e-7)


def test_1_the_compact_form_is_the_sequence():
    _, _, p, U = begin()
    hat = U.detach() / U.detach().norm(dim=0)
    T = torch.linalg.inv(torch.triu(hat.t() @ hat, diagonal=1) + torch.eye(4, dtype=torch.float64) / 2)
    close(p.rotation().dense(), torch.eye(8, dtype=torch.float64) - hat @ T @ hat.t(), 1e-10)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_2_orthogonality_determinant_and_rank(rank):
    model, handle, p, _ = begin(rank=rank)
    H, W = p.rotation().dense(), model.layer.weight
    close(H @ H.t(), torch.eye(8, dtype=torch.float64), 1e-10)
    assert float(torch.linalg.det(H)) == pytest.approx((-1) ** rank, abs=1e-9)
    close(torch.linalg.svdvals(effective(model, handle)), torch.linalg.svdvals(W), 1e-10)
    S = torch.linalg.svdvals(handle.update_of("layer").dense())
    assert S[rank] < 1e-12 * S[0] and S[rank - 1] > 1e-6 * S[0]


def test_3_the_paired_start_is_the_base_and_alive():
    layer, x, g = linear(12, 8), randn(5, 8, seed=1), randn(5, 12, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(hra(rank=6), layer)
    U = p.roles()["U"]
    assert torch.equal(U[:, 0::2], U[:, 1::2]) and U.norm(dim=0).min() > 0
    assert torch.linalg.matrix_rank(U) == 3
    close(p.rotation().dense(), torch.eye(8, dtype=torch.float64), 1e-7)
    close(model(x), base, 1e-12)
    backward(model, x, g)
    assert grad(U).norm(dim=0).min() > 1e-3


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_4_lengths_do_not_matter(gram_schmidt):
    model, handle, _, U = begin(gram_schmidt=gram_schmidt)
    before = handle.update_of("layer").dense().detach()
    put(U, U * torch.tensor([3.0, -0.2, 1e-3, -50.0], dtype=torch.float64))
    close(handle.update_of("layer").dense(), before, 1e-10)
    backward(model, randn(5, 8, seed=1), randn(5, 12, seed=2))
    along = (grad(U) * U).sum(0) / (grad(U).norm(dim=0) * U.norm(dim=0))
    assert along.abs().max() < 1e-6


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_4_gradient(gram_schmidt):
    model, _, _, U = begin(5, 6, 3, gram_schmidt=gram_schmidt)
    W, H = model.layer.weight.detach(), orthogonalized if gram_schmidt else chain
    G = backward(model, randn(7, 6, seed=1), randn(7, 5, seed=2))
    close(grad(U), central_difference(lambda value: float((G * (W @ H(value))).sum()), U.detach().clone()), 1e-7)


def test_5_orthonormal_vectors_need_no_gram_schmidt():
    _, plain, _, U = begin()
    _, other, _, V = begin(gram_schmidt=True)
    assert not torch.allclose(plain.update_of("layer").dense(), other.update_of("layer").dense())
    Q = torch.linalg.qr(randn(8, 4, seed=3))[0]
    put(U, Q)
    put(V, Q)
    close(plain.update_of("layer").dense(), other.update_of("layer").dense(), 1e-10)
    close(plain.update_of("layer").dense(), -2 * linear(12, 8).weight.detach() @ Q @ Q.t(), 1e-10)


def test_5_one_reflection_is_the_same_in_both():
    updates = [begin(rank=1, gram_schmidt=flag)[1].update_of("layer").dense() for flag in (False, True)]
    close(updates[0], updates[1], 1e-12)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_6_the_reversed_chain_is_the_transpose(rank):
    _, _, p, U = begin(rank=rank)
    H = p.rotation().dense().detach()
    put(U, U.flip(1))
    close(p.rotation().dense(), H.t(), 1e-10)
    assert not torch.allclose(H, H.t())


@pytest.mark.parametrize("gram_schmidt", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_6_export_is_a_plain_pair(rank, gram_schmidt):
    model, handle, _, U = begin(rank=rank, gram_schmidt=gram_schmidt)
    factors = handle.low_rank_of("layer")
    assert factors is not None and factors.rank == rank
    H = (orthogonalized if gram_schmidt else chain)(U.detach())
    close(factors.B @ factors.A, model.layer.weight @ (H - torch.eye(8, dtype=torch.float64)), 1e-10)


def test_6_merging_and_back():
    model, handle, _, U = begin()
    x, W = randn(5, 8, seed=1), model.layer.weight.detach().clone()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-10)
    close(model.layer.weight @ chain(U.detach()).t(), W, 1e-10)  # Hᵀ takes it out again
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)


def test_6_a_convolution_reflects_its_flat_kernel():
    layer = nn.Conv2d(2, 6, 3, padding=1).double()
    for k, tensor in enumerate(layer.parameters()):
        put(tensor, randn(*tensor.shape, seed=40 + k))
    x = randn(2, 2, 5, 4, seed=1)
    model, _, _, U = begin(layer=layer)
    matrix = (layer.weight.reshape(6, 18) @ chain(U.detach())).reshape(6, 2, 3, 3)
    close(model(x), F.conv2d(x, matrix, layer.bias, padding=1), 1e-10)
