"""Intruder dimensions against their spec (arXiv:2410.21228): full decompositions and every cosine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.certificates import intruders, scale_intruders, sweep, theory_intruder_dimensions
from rankwise.core.operators import Dense, LowRank
from rankwise.core.queries import SVD

D = 64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base_weight(seed: int, d: int = D) -> Tensor:
    """Singular values falling linearly from 10 to 1, vectors at random."""
    P, Q = torch.linalg.qr(normal(seed, d, d))[0], torch.linalg.qr(normal(seed + 500, d, d))[0]
    return P @ torch.diag(torch.linspace(10, 1, d, dtype=torch.float64)) @ Q.T


def unit(seed: int, d: int = D) -> Tensor:
    vector = normal(seed, d, 1)
    return vector / vector.norm()


def rank_one(seed: int, size: float, d: int = D) -> LowRank:
    return LowRank(unit(seed + 1000, d), unit(seed + 2000, d).T, size)


def noise(seed: int, size: float) -> Dense:
    E = normal(seed + 3000, D, D)
    return Dense(E * (size / E.norm()))


def by_hand(base: Tensor, tuned: Tensor, k: int = 10, eps: float = 0.5) -> list[bool]:
    """One flag per leading left vector, comparing with each of the base's in turn."""
    U0, U1 = torch.linalg.svd(base, full_matrices=False)[0], torch.linalg.svd(tuned, full_matrices=False)[0]
    flags = []
    for j in range(min(k, U1.shape[1])):
        flags.append(max(abs(float(U1[:, j] @ U0[:, i])) for i in range(U0.shape[1])) < eps)
    return flags


def count(base: Tensor, update: Dense | LowRank, k: int = 10, eps: float = 0.5) -> int:
    return int(intruders(base, update, k=k, eps=eps).flags.sum())


def test_0_flags_as_defined() -> None:
    for seed, size in [(0, 5.0), (1, 8.0), (2, 12.0), (3, 30.0)]:
        base = base_weight(seed)
        for update in (rank_one(seed, size), noise(seed, size)):
            assert intruders(base, update).flags.tolist() == by_hand(base, base + update.dense())
    wide, tall = normal(4, 6, 15), normal(5, 15, 6)
    for base in (wide, tall):
        m, n = base.shape
        update = LowRank(normal(6, m, 2), normal(7, 2, n), 2.0)
        tuned = base + update.dense()
        assert intruders(base, update, k=5).flags.tolist() == by_hand(base, tuned, k=5)
        assert intruders(base, update, k=5, side="right").flags.tolist() == by_hand(base.T, tuned.T, k=5)


@pytest.mark.parametrize("c", [0.01, 0.5, 1.0, 3.0, 100.0])
def test_1_scaled_base_has_none(c: float) -> None:
    base = base_weight(0)
    assert count(base, Dense((c - 1) * base)) == 0


def test_1_zero_update_has_none() -> None:
    assert count(base_weight(0), LowRank(torch.zeros(D, 4, dtype=torch.float64), normal(1, 4, D))) == 0


def test_2_a_rank_one_update_intrudes_once_it_reaches_the_top_of_the_spectrum() -> None:
    """Counts 0, 0, 0, 1, 1, 1 as the median of fifteen draws; single draws differ at c = 5 and 10."""
    medians = []
    for c in (0.0, 0.5, 5.0, 10.0, 20.0, 40.0):
        counts = sorted(count(base_weight(seed), rank_one(seed, c)) for seed in range(15))
        medians.append(counts[7])
        if c <= 0.5:
            assert counts[-1] == 0
        if c >= 20:
            assert counts[0] == 1
    assert medians == [0, 0, 0, 1, 1, 1]


def test_3_noise_of_the_same_norm_intrudes_too_where_it_dominates() -> None:
    """Medians of fifteen draws; at norm 40 nine, of a range from six to ten."""
    medians = []
    for c in (5.0, 20.0, 40.0):
        counts = sorted(count(base_weight(seed), noise(seed, c)) for seed in range(15))
        medians.append(counts[7])
    assert medians[0] == 0
    assert 3 <= medians[1] <= 5
    assert 8 <= medians[2] <= 10


def test_3_the_report_has_a_control_of_the_same_norm() -> None:
    counts = []
    for seed in range(7):
        report = theory_intruder_dimensions({"w": base_weight(seed)}, {"w": rank_one(seed, 40.0)}, seed=seed)
        (control,) = [value for name, value in report.measured.items() if "noise" in name or "control" in name]
        assert 1 in report.measured.values()  # the count of the update itself
        counts.append(control)
    assert 8 <= sorted(counts)[3] <= 10


@pytest.mark.parametrize("c", [-30.0, -5.0, 0.5, 5.0, 40.0])
def test_4_an_update_along_the_base_never_intrudes(c: float) -> None:
    base = base_weight(3)
    U, _, Vh = torch.linalg.svd(base)
    for i in (0, 20):
        assert count(base, LowRank(U[:, i : i + 1], Vh[i : i + 1], c)) == 0


def test_5_counts_grow_with_epsilon_and_k() -> None:
    base, update = {"a": base_weight(0), "b": base_weight(1)}, {"a": noise(0, 18.0), "b": rank_one(1, 12.0)}
    ks, epsilons = (1, 5, 10, 20, 50), (0.3, 0.4, 0.5, 0.6, 0.7)
    curve = sweep(base, update, ks=ks, epsilons=epsilons)
    for k in ks:
        for eps in epsilons:
            by_cosine = sum(sum(by_hand(base[site], base[site] + update[site].dense(), k, eps)) for site in base)
            assert curve[k, eps] == by_cosine
            assert curve[k, eps] <= 2 * k
    for k in ks:
        row = [curve[k, eps] for eps in epsilons]
        assert row == sorted(row)
    for eps in epsilons:
        column = [curve[k, eps] for k in ks]
        assert column == sorted(column)
    assert curve[50, 0.7] > curve[10, 0.5] > 0


def test_5_signs_of_singular_vectors_do_not_matter() -> None:
    base, update = base_weight(0), noise(0, 18.0)
    U, S, Vh = torch.linalg.svd(base, full_matrices=False)
    signs = torch.where(normal(9, D) > 0, 1.0, -1.0).double()
    plain = intruders(base, update)
    flipped = intruders(base, update, decomposed=SVD(U * signs, S, signs[:, None] * Vh))
    assert int(plain.flags.sum()) > 0 and torch.equal(plain.flags, flipped.flags)
    assert float((plain.cosines - flipped.cosines).abs().max()) < 1e-12
    assert torch.equal(plain.flags, intruders(-base, Dense(-update.dense())).flags)


def test_6_damping_of_one_changes_nothing() -> None:
    base, update = base_weight(0), rank_one(0, 20.0)
    assert count(base, update) == 1
    assert float((scale_intruders(base, update, 1.0).dense() - update.dense()).abs().max()) < 1e-10


@pytest.mark.parametrize("damping", [0.0, 0.3, 0.9])
def test_6_damped_weight_as_defined_and_exact_as_factors(damping: float) -> None:
    base = base_weight(0)
    update = LowRank(torch.cat([unit(i) for i in range(3)], dim=1), torch.cat([unit(10 + i).T for i in range(3)]), 25.0)
    tuned = base + update.dense()
    flags = by_hand(base, tuned)
    U, S, Vh = torch.linalg.svd(tuned)
    expected = tuned.clone()
    for j, flag in enumerate(flags):
        if flag:
            expected += (damping - 1) * S[j] * torch.outer(U[:, j], Vh[j])
    found = scale_intruders(base, update, damping)
    assert sum(flags) >= 2
    assert found.B.shape == (D, 3 + sum(flags)) and found.A.shape == (3 + sum(flags), D)
    assert float((base + found.dense() - expected).abs().max()) < 1e-5


def test_6_removing_an_isolated_intruder_clears_its_flag() -> None:
    base, update = base_weight(0), rank_one(0, 40.0)
    assert intruders(base, update).flags.tolist() == [True] + [False] * 9
    removed = scale_intruders(base, update, 0.0)
    assert count(base, removed) == 0
    top = torch.linalg.svd(base + update.dense())
    assert float((base + removed.dense()).T.mv(top[0][:, 0]).norm()) < 1e-9  # nothing left in that direction


def test_7_a_rank_one_update_can_turn_more_than_one_direction() -> None:
    """Near-equal singular values rotate freely, so only k bounds the count."""
    d = 40
    P, Q = torch.linalg.qr(normal(1, d, d))[0], torch.linalg.qr(normal(2, d, d))[0]
    base = P @ torch.diag(1 + 1e-4 * torch.linspace(1, 0, d, dtype=torch.float64)) @ Q.T
    # along one direction of each side of the flat spectrum, so that W' stays flat but for a turned basis
    u = P @ unit(3, d)
    update = LowRank(u, (Q @ P.T @ u).T, 5e-4)
    for k in (1, 3, 10):
        found = count(base, update, k=k)
        assert found <= k
        assert found == sum(by_hand(base, base + update.dense(), k))
    assert count(base, update, k=10, eps=0.7) > update.rank
