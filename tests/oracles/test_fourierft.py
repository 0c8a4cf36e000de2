"""Oracles of FourierFT: W' = W + a·Re(ifft2(F)), F zero but for trained real coefficients at fixed random frequencies."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankwise as rw
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

fourierft = rw.catalog.fourierft
M, N, A = 12, 8, 150.0


def by_fft(coefficients, positions, m=M, n=N, scale=A):
    spectrum = torch.zeros(m, n, dtype=coefficients.dtype)
    spectrum[positions[0], positions[1]] = coefficients
    return scale * torch.fft.ifft2(spectrum).real


def by_cosines(coefficients, positions, m=M, n=N, scale=A):
    o, i = torch.arange(m, dtype=DOUBLE)[:, None, None], torch.arange(n, dtype=DOUBLE)[None, :, None]
    return scale / (m * n) * (coefficients * torch.cos(2 * math.pi * (positions[0] * o / m + positions[1] * i / n))).sum(-1)


def generic(m=M, n=N, **options):
    """(model, handle, parameterization, coefficients, W) at a generic point."""
    layer = linear(m, n)
    W = layer.weight.detach().clone()
    model, handle, p = adapted(fourierft(**{"frequencies": 20, **options}), layer)
    fill(handle)
    return model, handle, p, p.roles()["coefficients"], W


def map_of(handle, coefficients):
    """The linear map c -> update as a matrix (m n, n_f)."""
    columns = []
    for k in range(len(coefficients)):
        put(coefficients, torch.eye(len(coefficients), dtype=DOUBLE)[k])
        columns.append(handle.update_of("layer").dense().detach().flatten())
    return torch.stack(columns, 1)


def test_start_and_counts():
    layer, x = linear(M, N), randn(9, N, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(fourierft(frequencies=20), layer)
    assert handle.trained_numbers == 20 and p.positions.shape == (2, 20)
    assert torch.equal(p.roles()["coefficients"], torch.zeros(20, dtype=DOUBLE))
    assert torch.equal(model(x), base)


def test_1_equals_peft():
    peft = pytest.importorskip("peft")
    x = randn(9, N, seed=1)
    model, handle, p, coefficients, _ = generic()
    other = One(linear(M, N))
    peft.inject_adapter_in_model(peft.FourierFTConfig(n_frequency=20, target_modules=["layer"]), other)
    assert torch.equal(p.positions, other.layer.indices["default"])
    put(other.layer.fourierft_spectrum["default"], coefficients)
    close(handle.update_of("layer").dense(), other.layer.get_delta_weight("default").detach(), 1e-7)
    close(model(x), other(x), 1e-7)


@pytest.mark.parametrize("tokens", [0, 1, 500])
@pytest.mark.parametrize(("m", "n", "frequencies"), [(M, N, 2), (M, N, 20), (7, 9, 30), (5, 5, 25), (6, 6, 1)])
def test_2_cosines_are_the_fft(m, n, frequencies, tokens):
    x = randn(tokens, n, seed=1)
    model, handle, p, coefficients, W = generic(m, n, frequencies=frequencies, scale=30.0)
    delta = by_fft(coefficients.detach(), p.positions, m, n, 30.0)
    close(by_cosines(coefficients.detach(), p.positions, m, n, 30.0), delta, 1e-12)
    close(handle.update_of("layer").dense(), delta, 1e-12)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)


def test_2_exact_lora_export():
    _, handle, p, coefficients, _ = generic(frequencies=2)
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank <= 4  # 2 n_f
    close(pair.dense(), by_fft(coefficients.detach(), p.positions), 1e-12)


def test_2_gradient():
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, p, coefficients, _ = generic()
    G = backward(model, x, g)
    close(grad(coefficients), A / (M * N) * torch.fft.fft2(G).real[p.positions[0], p.positions[1]], 1e-12)


@pytest.mark.parametrize("frequencies", [1, 3])
def test_3_rank_and_superposition(frequencies):
    _, handle, _, coefficients, _ = generic(frequencies=frequencies)
    first, second = randn(frequencies, seed=1), randn(frequencies, seed=2)
    updates = []
    for values in (first, second, 2 * first - 3 * second):
        put(coefficients, values)
        updates.append(handle.update_of("layer").dense().detach())
        assert torch.linalg.matrix_rank(updates[-1], rtol=1e-10) <= 2 * frequencies
    close(updates[2], 2 * updates[0] - 3 * updates[1], 1e-12)


def test_4_parseval():
    model, handle, p, coefficients, _ = generic(frequencies=M * N)
    place = torch.empty(M, N, dtype=torch.long)
    place[p.positions[0], p.positions[1]] = torch.arange(M * N)
    table = randn(M, N, seed=3)
    mirrored = torch.flip(table, (0, 1)).roll((1, 1), (0, 1))  # entry (-p mod m, -q mod n)
    put(coefficients, (table + mirrored)[p.positions[0], p.positions[1]])
    norm = handle.update_of("layer").dense().detach().square().sum()
    close(norm, A**2 / (M * N) * coefficients.detach().square().sum(), 1e-12)
    put(coefficients, 0.0)
    put(coefficients[place[2, 3]], 1.7)  # one generic frequency
    norm = handle.update_of("layer").dense().detach().square().sum()
    close(norm, torch.tensor(A**2 * 1.7**2 / (2 * M * N), dtype=DOUBLE), 1e-12)
    assert torch.isfinite(model(randn(2, N, seed=1))).all()


def test_5_mirrored_positions_add_up_and_zero_is_constant():
    _, handle, p, coefficients, _ = generic(frequencies=M * N)
    place = torch.empty(M, N, dtype=torch.long)
    place[p.positions[0], p.positions[1]] = torch.arange(M * N)

    def update(**values):
        put(coefficients, 0.0)
        for key, value in values.items():
            row, column = (int(part) for part in key[1:].split("_"))
            put(coefficients[place[row, column]], value)
        return handle.update_of("layer").dense().detach()

    close(update(p2_3=0.4), update(p10_5=0.4), 1e-12)
    close(update(p2_3=0.4, p10_5=0.5), update(p2_3=0.9), 1e-12)
    assert (update(p2_3=0.4) - update(p2_5=0.4)).norm() > 0.1
    close(update(p0_0=2.0), torch.full((M, N), A * 2.0 / (M * N), dtype=DOUBLE), 1e-12)


@pytest.mark.parametrize(("m", "n", "rank"), [(4, 4, 10), (3, 5, 8), (4, 6, 14), (4, 3, 7)])
def test_6_not_every_matrix_is_reachable(m, n, rank):
    own = sum(1 for p in range(m) for q in range(n) if (2 * p) % m == 0 and (2 * q) % n == 0)  # their own mirror images
    assert rank == (m * n + own) // 2
    _, handle, _, coefficients, _ = generic(m, n, frequencies=m * n)
    assert torch.linalg.matrix_rank(map_of(handle, coefficients), rtol=1e-10) == rank


def test_7_positions_are_those_of_randperm():
    _, _, p, _, _ = generic()
    order = torch.randperm(M * N, generator=torch.Generator().manual_seed(777))[:20]
    assert p.positions.tolist() == [(order // N).tolist(), (order % N).tolist()]
    _, _, q, _, _ = generic(location_seed=5)
    order = torch.randperm(M * N, generator=torch.Generator().manual_seed(5))[:20]
    assert q.positions.tolist() == [(order // N).tolist(), (order % N).tolist()]


def test_7_layers_of_one_shape_share_their_positions():
    model = nn.Sequential(linear(6, 6), linear(6, 6, seed=1))
    handle = rw.adapt_(model, fourierft(frequencies=10), seed=3)
    assert torch.equal(handle.parameterization("0").positions, handle.parameterization("1").positions)


def test_more_frequencies_than_entries_are_refused():
    with pytest.raises(rw.RankwiseError):
        adapted(fourierft(frequencies=M * N + 1), linear(M, N))


def test_merging():
    x = randn(9, N, seed=1)
    model, handle, _, _, W = generic()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
