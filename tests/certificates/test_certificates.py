"""Certificates: rank measures, intruder dimensions, and both gap bounds, against hand-made cases and brute force."""

import itertools
import math

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise import certificates as rc
from rankwise.certificates import asym_gap
from rankwise.certificates.theory_spectra import noise_energy_rank
from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.operators import Dense, LowRank
from rankwise.core.protocols import Report

D = torch.float64


def gen(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=D)


# -- spectra -------------------------------------------------------------------------------------------------------------


def test_measures_of_a_spectrum_done_by_hand():
    found = rc.ranks(torch.tensor([1.0, 3.0, 2.0], dtype=D))
    expected = {
        "hard": 3,
        "stable": 14 / 9,
        "effective": 2.7494592739972052,
        "participation": 2,
        "nuclear": 36 / 14,
        "energy_rank": 2,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_measures_order_and_do_not_see_scale_or_rotation():
    order = ("stable", "participation", "energy_entropy", "effective", "hard")
    for seed in range(300):
        s = torch.rand(1 + seed % 12, generator=gen(seed), dtype=D) ** (1 + seed % 5) + 1e-9
        found = rc.ranks(s)
        values = [1.0, *(found[key] for key in order)]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
        assert rc.ranks(7 * s) == pytest.approx(found, rel=1e-10)
    assert set(rc.ranks(torch.full((5,), 2.0, dtype=D)).values()) == {5.0} or all(
        value == pytest.approx(5) for value in rc.ranks(torch.full((5,), 2.0, dtype=D)).values()
    )
    assert all(value == pytest.approx(1) for value in rc.ranks(torch.tensor([3.0, 0, 0])).values())
    assert set(rc.ranks(torch.zeros(3)).values()) == {0.0}


def test_the_spectrum_of_factors_is_that_of_the_matrix():
    pair = LowRank(randn(12, 3), randn(3, 9, seed=1), 0.7)
    torch.testing.assert_close(rc.spectrum(pair), torch.linalg.svdvals(pair.dense())[:3], rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(120, 120), (60, 180)])
def test_the_noise_reference_is_that_of_noise(shape):
    drawn = rc.ranks(torch.linalg.svdvals(randn(*shape)))["energy_rank"]
    assert noise_energy_rank(*shape) == pytest.approx(drawn, abs=0.03 * min(shape))


def test_delta_rank_sees_the_update_and_rounding_noise():
    W = torch.randn(30, 20, generator=gen(0))
    low = LowRank(torch.randn(30, 2, generator=gen(1)), torch.randn(2, 20, generator=gen(2)))
    measured = rc.delta_rank({"w": W, "b": W[0]}, {"w": W + low.dense(), "b": W[0]}, energy=0.999)
    assert set(measured) == {"w"} and measured["w"]["energy_rank"] == 2 and measured["w"]["noise_share"] < 1e-5
    noisy = rc.delta_rank({"w": W.bfloat16()}, {"w": (W + 1e-4 * low.dense()).bfloat16()})
    assert noisy["w"]["noise_share"] > 0.3 and noisy["w"]["energy_rank"] > 2
    with pytest.raises(ArgumentError, match="another shape"):
        rc.delta_rank({"w": W}, {"w": W.t()})


def test_overlap_of_subspaces():
    eye = torch.eye(10, dtype=D)
    assert rc.overlap(eye[:, :3], eye[:, :3] @ randn(3, 3)) == pytest.approx(1)
    assert rc.overlap(eye[:, :3], eye[:, 3:5]) == pytest.approx(0, abs=1e-15)
    mean = sum(rc.overlap(randn(20, 3, seed=s), randn(20, 5, seed=s + 1000)) for s in range(300)) / 300
    assert mean == pytest.approx(5 / 20, rel=0.05)


def test_suggested_ranks_are_the_best_that_the_budget_buys():
    spectra = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([0.1, 0.05])}
    assert rc.suggest_ranks(spectra, 4) == {"a": 4, "b": 0}
    assert rc.suggest_ranks(spectra, 4, minimum=1) == {"a": 3, "b": 1}
    close = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.9, 2.0, 0.5])}
    for budget in range(6):
        best = max(
            ((i, j) for i in range(3) for j in range(4) if i + j <= budget),
            key=lambda r: close["a"][: r[0]].square().sum() + close["b"][: r[1]].square().sum(),
        )
        assert tuple(rc.suggest_ranks(close, budget).values()) == best
    cheap = rc.suggest_ranks(close, 30, shapes={"a": (5, 5), "b": (50, 50)})
    assert cheap == {"a": 2, "b": 0}
    with pytest.raises(ArgumentError, match="costs 110"):
        rc.suggest_ranks(close, 30, shapes={"a": (5, 5), "b": (50, 50)}, minimum=1)


@pytest.mark.parametrize("probes", [None, 8])
def test_local_rank_finds_the_bottleneck(probes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 10)).double()
    assert rc.local_rank(net, randn(4, 7), "4", probes=probes) == 3
    assert rc.local_rank(nn.Sequential(nn.Identity()), randn(2, 5), "0") == 5
    with pytest.raises(ArgumentError, match="no layer"):
        rc.local_rank(net, randn(1, 7), "9")


def test_the_spectra_report_tells_wasted_rank():
    wasted = LowRank(randn(20, 8) * torch.tensor([10.0, *[0.01] * 7], dtype=D), randn(8, 20, seed=1))
    report = rw.catalog.theory_spectra({"a": wasted})
    assert isinstance(report, Report) and report.bound is None and "hardly used" in report.reading
    assert report.table[0]["hard"] == 8 and report.table[0]["stable"] < 1.01


# -- intruder dimensions -------------------------------------------------------------------------------------------------


def based(d=32):
    U, V = torch.linalg.qr(randn(d, d))[0], torch.linalg.qr(randn(d, d, seed=1))[0]
    return (U * torch.linspace(10, 1, d, dtype=D)) @ V.t(), U, V


def rank_one(c, d=32):
    u, v = randn(d, 1, seed=5), randn(1, d, seed=6)
    return LowRank(c * u / u.norm(), v / v.norm())


def test_scaling_the_base_and_aligned_updates_make_no_intruder():
    W, U, V = based()
    for update in (Dense(2 * W), LowRank(30 * U[:, :1], V[:, :1].t()), LowRank(torch.zeros(32, 1, dtype=D), randn(1, 32))):
        assert not rc.intruders(W, update).flags.any()


def test_a_foreign_direction_appears_when_it_reaches_the_top():
    W, _, _ = based()
    counts = [int(rc.intruders(W, rank_one(c)).flags.sum()) for c in (0.0, 0.5, 20.0, 40.0)]
    assert counts == [0, 0, 1, 1]
    assert int(rc.intruders(W, rank_one(40.0), side="right").flags.sum()) == 1


def test_counts_grow_with_k_and_epsilon_and_the_sweep_agrees_with_single_counts():
    W, _, _ = based()
    noise = Dense(randn(32, 32, seed=8) * 3)
    curve = rc.sweep({"w": W}, {"w": noise}, ks=(1, 5, 10), epsilons=(0.3, 0.5, 0.7))
    for (k, eps), count in curve.items():
        assert count == int(rc.intruders(W, noise, k=k, eps=eps).flags.sum())
    for eps in (0.3, 0.5, 0.7):
        assert curve[1, eps] <= curve[5, eps] <= curve[10, eps]
    assert curve[10, 0.3] <= curve[10, 0.5] <= curve[10, 0.7] and curve[10, 0.7] > 0


def test_damping_is_exact_low_rank_and_removes_what_it_names():
    W, _, _ = based()
    update = rank_one(40.0)
    found = rc.intruders(W, update)
    for damping in (1.0, 0.4, 0.0):
        damped = rc.scale_intruders(W, update, damping)
        removed = (found.tuned.U * (found.tuned.S * found.flags)) @ found.tuned.Vh
        torch.testing.assert_close(damped.dense(), update.dense() + (damping - 1) * removed, rtol=0, atol=1e-10)
        assert damped.rank == 1 + int(found.flags.sum())
    assert not rc.intruders(W, rc.scale_intruders(W, update, 0.0)).flags.any()
    with pytest.raises(MergeError, match="no exact factors"):
        rc.scale_intruders(W, Dense(update.dense()), 0.0)


def test_the_largest_damping_that_halves_the_rise_is_chosen():
    chosen, table = rc.choose_damping(lambda x: 2.0 + x**2, 2.0, task_metric=lambda x: 1 - x)
    assert chosen == 0.5 and len(table) == 6 and table[0]["task"] == 0
    with pytest.raises(ArgumentError, match="halves"):
        rc.choose_damping(lambda x: 3.0, 2.0)


def test_the_intruder_report_compares_with_noise_of_the_same_size():
    W, _, _ = based(64)
    report = rw.catalog.theory_intruder_dimensions({"w": W}, {"w": rank_one(11.0, 64)})
    assert report.measured["intruders"] == 1 and report.measured["random control"] == 0 and report.bound is None
    assert "foreign" in report.reading and report.table[0]["positions"] == [0]
    assert "size of the update" in rw.catalog.theory_intruder_dimensions({"w": W}, {"w": rank_one(40.0, 64)}).reading
    assert "no new directions" in rw.catalog.theory_intruder_dimensions({"w": W}, {"w": Dense(W)}).reading
    with pytest.raises(ArgumentError, match="v"):
        rw.catalog.theory_intruder_dimensions({"w": W}, {"v": rank_one(1.0)})


# -- asymmetric bound ----------------------------------------------------------------------------------------------------


def test_the_bound_scales_as_it_should():
    norms = randn(50).abs()
    value = asym_gap.asym_gap_bound(norms, 2.0)
    assert asym_gap.asym_gap_bound(3 * norms, 2.0 / 3).value == pytest.approx(value.value, rel=1e-12)
    four = asym_gap.asym_gap_bound(norms.repeat(4), 2.0)
    assert (four.complexity, four.fluctuation) == pytest.approx((value.complexity / 2, value.fluctuation / 2), rel=1e-12)
    assert asym_gap.asym_gap_bound(norms * 2**0.5, 2.0).complexity == pytest.approx(2**0.5 * value.complexity, rel=1e-12)


def test_several_outputs_cost_the_square_root_of_their_number():
    """E‖Σ_i ε_i z_iᵀ‖_F with ε_i in {±1}^m, which vector contraction leads to, is √m times that of one output."""
    m, z = 9, randn(60, 4)
    signs = torch.randint(0, 2, (2000, m, 60), generator=gen(2)).double() * 2 - 1
    mean = (signs @ z).flatten(1).norm(dim=1).mean()
    allowed = math.sqrt(m) * z.square().sum().sqrt()
    assert 0.95 * allowed < mean <= allowed
    norms = z.norm(dim=1)
    one, many = (asym_gap.asym_gap_bound(norms, 1.0, outputs=k).complexity for k in (1, m))
    assert many == pytest.approx(math.sqrt(2 * m) * one, rel=1e-12)


def test_the_union_over_beta_spends_no_more_than_delta():
    shares = [asym_gap.union_over_beta(2.0**j, 0.05)[1] for j in range(-400, 401)]
    assert 0.0499 < sum(shares) <= 0.05
    assert asym_gap.union_over_beta(2.7, 0.05)[0] == 4.0 and asym_gap.union_over_beta(0.3, 0.05)[0] == 0.5


def test_calibration_recovers_a_curve_and_keeps_signs():
    points = [(r, N, 0.7 * math.sqrt(r / N) + 0.2 / math.sqrt(N)) for r in (2, 8, 32) for N in (100, 900)]
    fit = asym_gap.calibrate(points)
    assert (fit.c, fit.d) == pytest.approx((0.7, 0.2), abs=1e-8) and fit.residual < 1e-12
    falling = [(r, N, (1 - 0.1 * math.sqrt(r)) / math.sqrt(N)) for r in (1, 4, 16) for N in (100, 900)]
    fit = asym_gap.calibrate(falling)
    assert fit.c == 0.0 and fit.d > 0
    grid = [(c, d) for c in torch.linspace(0, 1, 60).tolist() for d in torch.linspace(0, 1.5, 90).tolist()]

    def loss(c, d):
        return sum((c * math.sqrt(r / N) + d / math.sqrt(N) - gap) ** 2 for r, N, gap in falling)

    assert loss(fit.c, fit.d) <= min(loss(c, d) for c, d in grid) + 1e-12
    with pytest.raises(ArgumentError, match="at least 4"):
        asym_gap.calibrate(points[:3])


def test_the_asymmetric_report_never_prints_a_bound_without_assumptions():
    rate = rw.catalog.theory_asym_bound(rank=4, samples=100)
    assert rate.bound is None and rate.measured["rate sqrt(r/N)"] == pytest.approx(0.2)
    factor = randn(3, 4)
    full = rw.catalog.theory_asym_bound(rank=4, samples=50, norms=randn(50).abs(), factor=factor)
    assert full.vacuous and len(full.assumptions) >= 4 and "vacuous here" in str(full)
    tiny = rw.catalog.theory_asym_bound(rank=4, samples=40000, norms=randn(40000).abs() * 0.1, factor=factor * 0.1)
    assert tiny.vacuous is False and tiny.bound < 0.2
    points = [(r, N, 0.7 * math.sqrt(r / N) + 1.4 / math.sqrt(N)) for r in (2, 8) for N in (100, 900)]
    assert "up to 4" in rw.catalog.theory_asym_bound(rank=4, samples=100, points=points).reading
    with pytest.raises(ArgumentError, match="A is trained"):
        rw.catalog.theory_asym_bound(rank=4, samples=100, input_frozen=False)


# -- bits ----------------------------------------------------------------------------------------------------------------


def test_anchors_of_the_bits_bounds():
    for numbers, expected in ((4_194_304, 15.25), (57_344, 1.783), (200, 0.1053)):
        assert rc.gap_it(rc.bits(numbers), 100_000) == pytest.approx(expected, rel=1e-3)
    assert rc.gap_occam(rc.bits(200), 100_000) == pytest.approx(0.1054, rel=1e-3)
    assert rc.gap_occam(0, 50) == pytest.approx(math.sqrt(math.log(20) / 100))
    size = rc.bits(500, 8)
    assert rc.gap_it(size, int(rc.samples_for(0.3, size))) == pytest.approx(0.3, rel=1e-4)


def test_comparison_by_ratio_and_by_file(tmp_path):
    tensors = {"B": torch.zeros(8, 2), "A": torch.zeros(2, 8)}
    file = tmp_path / "adapter.bin"
    file.write_bytes(b"x" * 10)
    rows = rc.compare({"both": tensors, "B only": {"B": tensors["B"]}, "file": file}, 1000)
    assert rows[1]["ratio to first"] == pytest.approx(1 / math.sqrt(2), rel=1e-12) and rows[2]["bits"] == 80
    with pytest.raises(ArgumentError, match="no file"):
        rc.bits(tmp_path / "none")


@pytest.mark.parametrize("q", [2, 3, 8, 16])
def test_quantization_uses_no_more_values_than_its_bits_hold(q):
    tensor = randn(4000)
    done = rc.quantize({"a": tensor, "zero": torch.zeros(3)}, q)
    assert done["a"].unique().numel() <= 2**q - 1 and not done["zero"].any()
    step = tensor.abs().max() / (2 ** (q - 1) - 1)
    assert (done["a"] - tensor).abs().max() <= step / 2 * (1 + 1e-6)


def test_best_q_weighs_risk_against_bits():
    tensors = {"B": randn(10, 2)}

    def spoiled(quantized):
        return min(1.0, float((quantized["B"] - tensors["B"]).norm() / tensors["B"].norm()))

    few, many = rc.best_q(tensors, spoiled, 300), rc.best_q(tensors, spoiled, 10_000_000)
    assert few.q < many.q and len(few.table) == 5
    chosen = next(row for row in few.table if row["q"] == few.q)
    assert chosen["bits"] == pytest.approx(20 * few.q + 32 + math.log2(5))
    assert rc.best_q(tensors, lambda quantized: 0.0, 300).q == 2


def test_the_occam_bound_holds_for_the_best_of_random_classifiers():
    """2^K classifiers on coin flips: true risk 1/2, the best one's train risk falls below by more than the bound rarely."""
    K, N, repeats = 6, 200, 400
    bound = rc.gap_occam(K, N, delta=0.05)
    wrong = torch.randint(0, 2, (repeats, 2**K, N), generator=gen(0)).double().mean(2).min(1).values
    assert float((0.5 - wrong > bound).double().mean()) <= 0.05 and float((0.5 - wrong).mean()) > bound / 3


def test_the_information_report_says_vacuous_where_it_is():
    assert rw.catalog.theory_information_bound(4_194_304, 100_000).vacuous is True
    small = rw.catalog.theory_information_bound(200, 100_000)
    assert small.vacuous is False and "not vacuous here" in str(small) and small.assumptions
    assert rw.catalog.theory_information_bound(200, 100_000, extra_bits=1000).bound > small.bound
