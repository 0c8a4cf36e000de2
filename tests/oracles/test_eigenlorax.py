"""Oracles of EigenLoRAx: frozen principal directions of many adapters, W' = W + E_B C_B (E_A C_A)ᵀ with C trained.

With center=True the basis holds the principal directions of the centered factors and then the mean direction, so that no
source is lost; with P random components come P further columns.
"""

import pytest
import torch

import rankwise as rw
from tests.oracles.tools import One, adapted, backward, close, fill, grad, linear, put, randn

eigenlorax = rw.catalog.eigenlorax
M, N, RANK = 26, 22, 3


def sources(folder, count=4, m=M, n=N, rank=RANK, factors=None):
    """Saved LoRA adapters with different alpha: their folders, and (s B, A) of each."""
    folders, pairs = [], []
    for t in range(count):
        alpha = 2.0 + t
        _, handle, p = adapted(rw.catalog.lora(rank=rank, alpha=alpha), linear(m, n))
        fill(handle, seed=100 + 13 * t)
        if factors is not None:
            put(p.roles()["B"], factors[t][0])
            put(p.roles()["A"], factors[t][1])
        folders.append(str(handle.save(folder / f"adapter{t}")))
        pairs.append((alpha / rank * p.roles()["B"].detach().clone(), p.roles()["A"].detach().clone()))
    return tuple(folders), pairs


def stacked(pairs):
    """X_A (n, Σr) and X_B (m, Σr), the scale folded into B."""
    return torch.cat([A.t() for _, A in pairs], 1), torch.cat([B for B, _ in pairs], 1)


def centered(X):
    return X - X.mean(1, keepdim=True)


def distance(E, F):
    """Sine of the largest principal angle between the spans of orthonormal columns of one number."""
    assert E.shape == F.shape
    return float(torch.linalg.matrix_norm(F - E @ (E.t() @ F), 2))


def begin(folders, m=M, n=N, **options):
    return adapted(eigenlorax(adapters=folders, **{"rank": RANK, **options}), linear(m, n))


def bases(p):
    return p.basis_A, p.basis_B


@pytest.mark.parametrize("center", [True, False])
def test_1_the_basis_is_orthonormal_and_principal(center, tmp_path):
    folders, pairs = sources(tmp_path)
    _, _, p = begin(folders, components=5, center=center)
    for E, X in zip(bases(p), stacked(pairs), strict=True):
        assert E.shape == (X.shape[0], 6 if center else 5)  # and the mean direction
        close(E.t() @ E, torch.eye(E.shape[1], dtype=torch.float64), 1e-6)
        U = torch.linalg.svd(centered(X) if center else X, full_matrices=False)[0]
        for k in range(5):
            assert abs(float(E[:, k] @ U[:, k])) == pytest.approx(1, abs=1e-10)
        assert distance(E[:, :5], U[:, :5]) < 1e-5
        if center:
            whole = torch.cat([U[:, :5], X.mean(1, keepdim=True)], 1)
            assert distance(E, torch.linalg.qr(whole)[0]) < 1e-5


@pytest.mark.parametrize("center", [True, False])
def test_1_random_components_are_orthonormal_to_the_rest(center, tmp_path):
    folders, _ = sources(tmp_path)
    _, _, plain = begin(folders, components=5, center=center)
    _, _, p = begin(folders, components=5, center=center, random_components=4)
    _, _, again = begin(folders, components=5, center=center, random_components=4)
    for E, F, G in zip(bases(p), bases(plain), bases(again), strict=True):
        k = F.shape[1]
        assert E.shape[1] == k + 4
        close(E.t() @ E, torch.eye(k + 4, dtype=torch.float64), 1e-6)
        close(E[:, :5], F[:, :5], 1e-10)
        assert distance(F, E @ torch.linalg.qr(E.t() @ F)[0]) < 1e-5
        assert torch.equal(E, G)


@pytest.mark.parametrize("sizes", [{"components": 20, "random_components": 3}, {"components": N + 1}])
def test_1_more_components_than_dimensions_are_refused(sizes, tmp_path):
    folders, _ = sources(tmp_path, count=10)
    with pytest.raises(rw.RankwiseError):
        begin(folders, center=False, **sizes)


@pytest.mark.parametrize("center", [True, False])
def test_2_the_basis_is_optimal(center, tmp_path):
    folders, pairs = sources(tmp_path)
    _, _, p = begin(folders, components=5, center=center)
    for E, X in zip(bases(p), stacked(pairs), strict=True):
        X = centered(X) if center else X
        best = (X - E[:, :5] @ (E[:, :5].t() @ X)).square().sum()
        assert float(best) == pytest.approx(float(torch.linalg.svdvals(X)[5:].square().sum()), rel=1e-6)
        for seed in range(100):
            Q = torch.linalg.qr(randn(X.shape[0], 5, seed=seed))[0]
            assert float((X - Q @ (Q.t() @ X)).square().sum()) > float(best)


def project(p, pair):
    """The coefficients of a source, by projection."""
    (E_A, E_B), (B, A) = bases(p), pair
    put(p.roles()["coefficients_A"], E_A.t() @ A.t())
    put(p.roles()["coefficients_B"], E_B.t() @ B)


@pytest.mark.parametrize(("center", "components"), [(False, 12), (True, 11)])
def test_3_every_source_comes_back(center, components, tmp_path):
    folders, pairs = sources(tmp_path)  # 4 of rank 3: X has rank 12, centered 11
    _, handle, p = begin(folders, components=components, center=center)
    for B, A in pairs:
        project(p, (B, A))
        close(handle.update_of("layer").dense(), B @ A, 1e-10)
    # without the mean direction the centered basis leaves an error, so the test above would notice its absence
    E_A, E_B = (E[:, :11] for E in bases(p))
    B, A = pairs[0]
    lost = E_B @ (E_B.t() @ B) @ (A @ E_A) @ E_A.t() - B @ A
    assert float(lost.norm() / (B @ A).norm()) > 0.02


def test_3_peft_folders_are_sources_by_way_of_from_peft(tmp_path):
    """Methods know nothing of foreign formats, so a folder of PEFT's is refused with the way out, which is gone here."""
    folders, pairs = sources(tmp_path)
    converted = []
    for t, folder in enumerate(folders):
        peft = str(tmp_path / f"peft{t}")
        rw.interop.to_peft(rw.load_(One(linear(M, N)), folder), peft)
        with pytest.raises(rw.RankwiseError, match=r"PEFT adapter: .*rankwise\.interop\.from_peft.*handle\.save"):
            begin((peft,), components=1)
        converted.append(str(rw.interop.from_peft(One(linear(M, N)), peft).save(tmp_path / f"back{t}")))
    _, handle, p = begin(tuple(converted), components=12, center=False)
    for B, A in pairs:
        project(p, (B, A))
        close(handle.update_of("layer").dense(), B @ A, 1e-5)


def test_4_a_planted_subspace_is_found(tmp_path):
    k = 5
    left, right = randn(M, k, seed=1), randn(k, N, seed=2)
    factors = [(left @ randn(k, RANK, seed=10 + t), randn(RANK, k, seed=30 + t) @ right) for t in range(4)]
    folders, _ = sources(tmp_path, factors=factors)
    _, _, p = begin(folders, components=k, center=False)
    for E, planted in zip(bases(p), (right.t(), left), strict=True):
        assert distance(E, torch.linalg.qr(planted)[0]) < 1e-6


def test_5_all_directions_reach_every_lora(tmp_path):
    folders, _ = sources(tmp_path, count=5, m=12, n=12)
    _, handle, p = begin(folders, m=12, n=12, components=12, center=False)
    B, A = randn(12, RANK, seed=3), randn(RANK, 12, seed=4)
    project(p, (B, A))
    close(handle.update_of("layer").dense(), B @ A, 1e-10)
    factors = handle.low_rank_of("layer")
    assert factors is not None and factors.rank == RANK
    close(factors.B @ factors.A, B @ A, 1e-10)


def test_5_counts(tmp_path):
    # RoBERTa-base, K = 64 and r = 8: 1024 per matrix where LoRA has 12,288. Neither depends on m and n; 2 · 64 · 8 = 1024.
    folders, _ = sources(tmp_path, count=3, m=70, n=66, rank=8)
    _, handle, _ = begin(folders, m=70, n=66, rank=8, components=24, random_components=40, center=False)
    assert handle.trained_numbers == 1024
    assert 8 * (768 + 768) == 12_288
    _, handle, p = begin(folders, m=70, n=66, rank=5, components=7, center=False)
    assert handle.trained_numbers == 2 * 7 * 5
    assert p.roles()["coefficients_A"].shape == p.roles()["coefficients_B"].shape == (7, 5)


@pytest.mark.parametrize("center", [True, False])
def test_6_gradients(center, tmp_path):
    folders, _ = sources(tmp_path)
    model, handle, p = begin(folders, components=6, center=center)
    fill(handle)
    G = backward(model, randn(9, N, seed=1), randn(9, M, seed=2))
    E_A, E_B = bases(p)
    C_A, C_B = p.roles()["coefficients_A"], p.roles()["coefficients_B"]
    A, B = (E_A @ C_A).t(), E_B @ C_B
    close(handle.update_of("layer").dense(), B @ A, 1e-12)
    close(grad(C_B), E_B.t() @ G @ A.t(), 1e-10)
    close(grad(C_A), E_A.t() @ G.t() @ B, 1e-10)
    assert not E_A.requires_grad and not E_B.requires_grad


def test_6_starts(tmp_path):
    folders, _ = sources(tmp_path)
    layer, x, g = linear(M, N), randn(9, N, seed=1), randn(9, M, seed=2)
    base = layer(x).detach()
    model, _, p = adapted(eigenlorax(adapters=folders, rank=RANK, components=6), layer)
    assert torch.equal(model(x), base)
    assert not p.roles()["coefficients_B"].any() and p.roles()["coefficients_A"].abs().min() > 0
    backward(model, x, g)
    assert grad(p.roles()["coefficients_B"]).any() and not grad(p.roles()["coefficients_A"]).any()
    model, _, p = begin(folders, components=6, start="uniform")
    for tensor in p.roles().values():
        assert 0.3 < float(tensor.abs().max()) <= 0.5
    assert not torch.allclose(model(x), base)


def test_6_it_comes_back_from_a_checkpoint(tmp_path):
    folders, _ = sources(tmp_path / "sources")
    _, handle, _ = begin(folders, components=6)
    fill(handle)
    again = rw.load_(One(linear(M, N)), handle.save(tmp_path / "adapter"))
    for mine, stored in zip(bases(again.parameterization("layer")), bases(handle.parameterization("layer")), strict=True):
        assert torch.equal(mine, stored)
    close(again.update_of("layer").dense(), handle.update_of("layer").dense(), 1e-12)
