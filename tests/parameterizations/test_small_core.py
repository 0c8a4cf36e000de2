"""LoRA-XS: frames with fixed signs, starts as thin decompositions, restarts, and the randomized frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.parameterizations.small_core import SmallCore


def weight(m: int = 9, n: int = 7) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def adapted(text: str = "lora_xs(rank=3)", W: Tensor | None = None) -> tuple[nn.Sequential, rankwise.Handle, SmallCore]:
    W = weight() if W is None else W
    model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0])).double()
    with torch.no_grad():
        model[0].weight.copy_(W)
    handle = rankwise.adapt_(model, rankwise.compose(text), where=["0"])
    entry = handle.parameterization("0")
    assert isinstance(entry, SmallCore)
    return model, handle, entry


@pytest.mark.parametrize(("side", "left", "right"), [("input", 0.0, 1.0), ("output", 1.0, 0.0), ("both", 0.5, 0.5)])
def test_frames_are_the_leading_singular_vectors(side: str, left: float, right: float) -> None:
    _, _, entry = adapted(f"lora_xs(rank=3, singular_values='{side}')")
    U, S, Vh = torch.linalg.svd(weight())
    torch.testing.assert_close(entry.B @ entry.A, (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entry.B.t() @ entry.B, torch.diag(S[:3] ** (2 * left)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entry.A @ entry.A.t(), torch.diag(S[:3] ** (2 * right)), rtol=1e-10, atol=1e-10)
    largest = entry.B.gather(0, entry.B.abs().argmax(0, keepdim=True))
    assert (largest > 0).all(), "signs are fixed"


def test_singular_values_scale_by_the_core() -> None:
    """R = diag(t) turns σ_i into σ_i (1 + s t_i) and leaves the vectors."""
    model, handle, entry = adapted("lora_xs(rank=3, alpha=6)")
    assert entry.scale == 2.0
    t = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    with torch.no_grad():
        entry.R.copy_(torch.diag(t))
    S = torch.linalg.svdvals(weight())
    expected = S.clone()
    expected[:3] *= 1 + 2 * t
    found = torch.linalg.svdvals(model[0].weight + handle.update_of("0").dense())
    torch.testing.assert_close(found, expected.sort(descending=True).values)


def test_the_core_starts_at_its_deviation_and_zero_is_allowed() -> None:
    _, _, entry = adapted("lora_xs(rank=7, core_std=0.01)")
    assert 0.007 < entry.R.std().item() < 0.013
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model, _, entry = adapted("lora_xs(rank=3, core_std=0.0)")
    torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].weight, model[0].bias), rtol=0, atol=0)
    model(x).square().sum().backward()
    assert entry.R.grad.abs().min() > 0, "a core of zeros is no dead start"


def test_a_start_is_held_exactly_between_orthonormal_frames(tmp_path: Path) -> None:
    model, handle, entry = adapted("lora_xs(rank=3, alpha=6)")
    generator = torch.Generator().manual_seed(2)
    B = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    A = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        entry.load_factors(rankwise.LowRank(B, A))
    torch.testing.assert_close(handle.update_of("0").dense(), 2.0 * B @ A, rtol=1e-12, atol=1e-12)
    for gram in (entry.B.t() @ entry.B, entry.A @ entry.A.t()):
        torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    S = entry.R.diagonal()
    assert torch.equal(entry.R, torch.diag(S)) and (S.diff() <= 0).all() and (S >= 0).all()
    handle.save(tmp_path)
    fresh = nn.Sequential(nn.Linear(7, 9)).double()
    fresh.load_state_dict({key: model.state_dict()[key] for key in ("0.weight", "0.bias")})
    loaded = rankwise.load_(fresh, tmp_path)
    assert torch.equal(loaded.update_of("0").dense(), handle.update_of("0").dense()), "frames are stored"


def test_a_start_as_wide_as_the_layer_and_one_of_lower_rank() -> None:
    _, handle, entry = adapted("lora_xs(rank=7)")
    B, A = weight(9, 7), torch.eye(7, dtype=torch.float64)
    with torch.no_grad():
        entry.load_factors(rankwise.LowRank(B, A))
    torch.testing.assert_close(handle.update_of("0").dense(), B, rtol=1e-12, atol=1e-12)
    _, handle, entry = adapted()
    with torch.no_grad():
        entry.load_factors(rankwise.LowRank(torch.ones(9, 3).double(), torch.ones(3, 7).double()))
    torch.testing.assert_close(handle.update_of("0").dense(), torch.full((9, 7), 3.0, dtype=torch.float64))


def test_a_restart_reads_the_frames_off_the_new_weight() -> None:
    model, handle, entry = adapted()
    with torch.no_grad():
        entry.R.fill_(0.5)
        model[0].weight.copy_(weight().flip(0))
        from rankwise.core.randomness import MaskStream
        from rankwise.core.sites import site_of

        entry.restart(site_of(handle.targets["0"], 1, MaskStream(1)))
    assert not entry.update().dense().any()
    U, S, Vh = torch.linalg.svd(weight().flip(0))
    torch.testing.assert_close(entry.B @ entry.A, (U[:, :3] * S[:3]) @ Vh[:3])


def test_randomized_frames_approach_the_exact_ones() -> None:
    U, _, Vh = torch.linalg.svd(torch.randn(40, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    S = torch.tensor([10.0, 9.0, 8.0] + [1.0] * 27, dtype=torch.float64)
    W = (U[:, :30] * S) @ Vh
    _, _, exact = adapted(W=W)
    _, _, randomized = adapted("lora_xs(rank=3, iterations=10)", W)
    torch.testing.assert_close(randomized.B, exact.B, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(randomized.A, exact.A, rtol=1e-8, atol=1e-8)


def test_unknown_options_are_refused() -> None:
    for text, said in (("frames='qr'", "svd or kaiming"), ("singular_values='left'", "input, output or both")):
        with pytest.raises(ArgumentError, match=said):
            adapted(f"lora_xs(rank=2, {text})")
    _, _, entry = adapted("lora_xs(rank=3, frames='kaiming')")
    assert entry.A.abs().max() <= 7**-0.5 and entry.B.abs().max() <= 3**-0.5
