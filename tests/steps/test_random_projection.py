"""Random projections: their law, and that they depend on the seed alone."""

import math

import pytest
import torch

from rankwise.steps.random_projection import derived_seed, normals, projection_of


def drawn(*shape, seed=0, **options):
    return normals(shape, seed, **{"device": "cpu", "dtype": torch.float64, **options})


def test_the_numbers_are_normal():
    x = drawn(400_000)
    assert abs(float(x.mean())) < 5 / math.sqrt(len(x))
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / len(x))
    assert abs(float(x.pow(4).mean()) - 3) < 5 * math.sqrt(96 / len(x))
    exact = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))  # a Kolmogorov-Smirnov test at about 1e-6
    assert float((exact - torch.arange(1, len(x) + 1) / len(x)).abs().max()) < 2.7 / math.sqrt(len(x))


@pytest.mark.parametrize("lag", [1, 2, 3, 100_000])
def test_neighbors_and_halves_are_uncorrelated(lag):
    x = drawn(200_000)
    assert abs(float((x[:-lag] * x[lag:]).mean())) < 5 / math.sqrt(len(x) - lag)


def test_neighboring_seeds_are_uncorrelated():
    one, two = drawn(100_000, seed=7), drawn(100_000, seed=8)
    assert abs(float((one * two).mean())) < 5 / math.sqrt(len(one))
    assert abs(float((one[1:] * two[:-1]).mean())) < 5 / math.sqrt(len(one))


def test_a_seed_gives_the_same_numbers_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    assert torch.equal(drawn(5, 3), drawn(5, 3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(drawn(5, 3), drawn(5, 3, seed=1))
    torch.testing.assert_close(drawn(5, 3).float(), drawn(5, 3, dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_known_numbers():
    """So that a stored run can be gone on with by a later version."""
    expected = torch.tensor([-0.5096335819209017, 0.08051364519426862, 0.15153915814927574], dtype=torch.float64)
    torch.testing.assert_close(drawn(3, seed=1), expected)


def test_the_smaller_side_is_projected_with_variance_one_over_rank():
    left, right = (projection_of(m, n, 4, 3, device="cpu", dtype=torch.float64) for m, n in ((300, 500), (500, 300)))
    assert left.Q is None and left.P.shape == (300, 4)
    assert right.P is None and right.Q.shape == (4, 300)
    for basis in (left.P, right.Q):
        assert abs(float(basis.square().mean()) - 0.25) < 5 * 0.25 * math.sqrt(2 / basis.numel())


def test_back_and_forth_is_unbiased_with_the_known_error():
    x = drawn(20, 40, seed=5)
    back = [
        (lambda p: p.up(p.down(x)))(projection_of(20, 40, 4, derived_seed(0, i), device="cpu", dtype=torch.float64))
        for i in range(2000)
    ]
    mean = torch.stack(back).mean(0)
    errors = torch.stack([(one - x).square().sum() / x.square().sum() for one in back])
    assert float((mean - x).norm() / x.norm()) < 0.1
    assert abs(float(errors.mean()) - 21 / 4) < 0.15


def test_derived_seeds_differ():
    seeds = {derived_seed(seed, site, window) for seed in range(5) for site in ("a", "b") for window in range(50)}
    assert len(seeds) == 500 and all(0 <= seed < 2**63 for seed in seeds)
