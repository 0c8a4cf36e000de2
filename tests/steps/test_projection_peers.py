"""The authors' packages take the same way: GaLore's and APOLLO's.

Three things are set alike, since they are arbitrary or differ on purpose: signs of singular vectors (arbitrary in the
packages, fixed here), APOLLO's random numbers (ours are the same on every device), and ε = 0 (beside √v in the packages,
beside the corrected √v̂ here and in torch). Decay is left out: the packages apply it to the weight that has moved already. The
packages find singular vectors in float32 also for float64 weights, which is why agreement ends at about 1e-6.
"""

import pytest
import torch

from rankwise.core.piece import piece
from rankwise.steps.apollo import apollo
from rankwise.steps.bases import signed
from rankwise.steps.galore import galore
from rankwise.steps.moments import adamw
from rankwise.steps.random_projection import derived_seed, normals
from tests.steps.stepping import draws, run

SHAPES = [(6, 9), (9, 6), (7, 7)]
RATE = 0.1


def peer(optimizer_of, W, gradients):
    weight = torch.nn.Parameter(W.clone())
    optimizer = optimizer_of(weight)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def fix_signs(monkeypatch, projector):
    def fixed(self, weights, rank, type):
        found = original(self, weights, rank, type)
        if type == "full":
            return [signed(found[0].mT).mT, signed(found[1])]
        return signed(found) if type == "right" else signed(found.mT).mT

    original = projector.get_orthogonal_matrix
    monkeypatch.setattr(projector, "get_orthogonal_matrix", fixed)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_galore_takes_the_way_of_galore_torch(monkeypatch, shape, side):
    package = pytest.importorskip("galore_torch")
    if shape[0] == shape[1] and side == "reverse_std":
        pytest.skip("galore-torch projects a square weight on the left and back on the right under reverse_std")
    fix_signs(monkeypatch, package.galore_projector.GaLoreProjector)
    W, *gradients = draws(*shape, 13)
    options = {"rank": 3, "update_proj_gap": 4, "scale": 0.25, "proj_type": side}
    # On both sides R is diagonal at a refresh: beside it are rounding errors, whose sign ε = 0 would bring up to ±1. With means
    # that forget at once there is no bias to correct, and ε stands at the same place.
    adam = {"eps": 0.1, "betas": (0.0, 0.0)} if side == "full" else {"eps": 0.0}

    def theirs(weight):
        return package.GaLoreAdamW([{"params": [weight], **options}], lr=RATE, no_deprecation_warning=True, **adam)

    mine, _ = run([galore(rank=3, refresh=4, side=side, inner=piece(adamw, **adam))], W, gradients, lr=RATE)
    close(mine[-1], peer(theirs, W, gradients))


def apollo_peer(package, monkeypatch, *, betas=(0.9, 0.999), limiter=True, **options):
    windows = iter(range(100))
    seed = derived_seed(0, "site", "weight")

    def stable_randn(shape, *_, **__):
        return normals(tuple(shape), derived_seed(seed, next(windows)), device="cpu", dtype=torch.float64)

    monkeypatch.setattr(package.random_projector, "stable_randn", stable_randn)
    fix_signs(monkeypatch, package.svd_projector.GaLoreProjector)
    known = {"rank": 3, "update_proj_gap": 4, "scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}

    def make(weight):
        group = {"params": [weight], **known, **options}
        return package.APOLLOAdamW([group], lr=RATE, eps=0.0, betas=betas, disable_nl=not limiter)

    return make


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", ["random", "svd"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_takes_the_way_of_apollo_torch(monkeypatch, shape, basis, granularity):
    package = pytest.importorskip("apollo_torch")
    W, *gradients = draws(*shape, 13)
    theirs = apollo_peer(package, monkeypatch, limiter=False, proj=basis, scale_type=granularity, scale=4.0)
    options = {"scale": 4.0, "limit": None, "basis": basis, "granularity": granularity, "inner": piece(adamw, eps=0.0)}
    mine, _ = run([apollo(rank=3, refresh=4, **options)], W, gradients, lr=RATE)
    close(mine[-1], peer(theirs, W, gradients))


@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_limits_growth_as_apollo_torch_does(monkeypatch, shape):
    """With means that forget at once, so that there is no bias: the package limits U before it is corrected for it."""
    package = pytest.importorskip("apollo_torch")
    W, *gradients = draws(*shape, 13)
    growing = [gradient * (1 + index) for index, gradient in enumerate(gradients)]
    theirs = apollo_peer(package, monkeypatch, betas=(0.0, 0.0), scale=4.0)
    step = piece(adamw, eps=0.0, betas=(0.0, 0.0))
    mine, _ = run([apollo(rank=3, refresh=4, scale=4.0, inner=step)], W, growing, lr=RATE)
    free, _ = run([apollo(rank=3, refresh=4, scale=4.0, inner=step, limit=None)], W, growing, lr=RATE)
    close(mine[-1], peer(theirs, W, growing))
    assert not torch.allclose(mine[-1], free[-1], atol=1e-2)  # the limiter had something to do
