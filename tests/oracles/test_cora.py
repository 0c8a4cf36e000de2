"""CoRA against its spec (arXiv:2409.02119): B starts at, or stays at, the common column space of several earlier adapters.

The spread of what is stacked is an option (per site, per kind of layer, all); M_i is s_i B_i A_i, or W plus it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handle import Handle
from tests.oracles.tools_training import SITE, layer_model, normal, orthonormal, put, relative, roles_of, truncated

M, N, SOURCES, SOURCE_RANK, RANK = 20, 15, 4, 3, 6
WEIGHT = normal(0, M, N)


def save_source(folder: Path, model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], alpha: float) -> str:
    """Saves a LoRA adapter with these factors (B, A) at these sites."""
    rank = next(iter(factors.values()))[1].shape[0]
    handle = rankwise.adapt_(model, rankwise.catalog.lora(rank=rank, alpha=alpha), where=list(factors))
    for site, (B, A) in factors.items():
        put(handle, {"B": B, "A": A}, site)
    handle.save(folder)
    handle.detach_()
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], list[Tensor]]:
    """Folders of four adapters of rank 3, and their updates."""
    root, folders, updates = tmp_path_factory.mktemp("sources"), [], []
    for k in range(SOURCES):
        B, A, alpha = normal(10 + k, M, SOURCE_RANK), normal(20 + k, SOURCE_RANK, N), float(k + 1)
        folders.append(save_source(root / str(k), layer_model(WEIGHT), {SITE: (B, A)}, alpha))
        updates.append(alpha / SOURCE_RANK * B @ A)
    return tuple(folders), updates


def adapt(folders: tuple[str, ...], *, steps: str = "sgd", **options) -> tuple[nn.Module, Handle]:
    model = layer_model(WEIGHT)
    recipe = rankwise.catalog.cora(sources=folders, **{"rank": RANK, **options})
    return model, rankwise.adapt_(model, rankwise.compose(recipe, steps))


def left(matrices: list[Tensor], rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors and all singular values of [M_1, M_2, …]."""
    U, S, _ = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    return U[:, :rank], S


def factor(handle: Handle, site: str = SITE) -> Tensor:
    entry = handle.parameterization(site)
    tensors: dict[str, Tensor] = {**dict(entry.named_buffers()), **dict(entry.named_parameters())}
    return tensors["B"]


def lost(matrices: list[Tensor], C: Tensor) -> float:
    return sum(float((matrix - C @ (C.T @ matrix)).square().sum()) for matrix in matrices)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("rank", [2, 6, 10])
def test_1_the_common_subspace_is_optimal(sources, freeze: bool, rank: int) -> None:
    folders, updates = sources
    C = factor(adapt(folders, rank=rank, freeze=freeze)[1]).detach()
    assert float((C.T @ C - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-12
    found = lost(updates, C)
    assert found == pytest.approx(float(left(updates)[1][rank:].square().sum()), rel=1e-10)
    for seed in range(50):
        assert found < lost(updates, orthonormal(100 + seed, M, rank))
        assert found < lost(updates, torch.linalg.qr(C + 0.1 * normal(200 + seed, M, rank))[0])


def test_2_the_factors_give_what_the_dense_matrices_give(sources) -> None:
    folders, updates = sources
    C, expected = factor(adapt(folders)[1]), left(updates)[0]
    assert float((C @ C.T - expected @ expected.T).norm()) < 1e-12


@pytest.mark.parametrize("gain", [1.0, 2.5])
def test_3_sources_inside_one_subspace_are_represented(tmp_path: Path, gain: float) -> None:
    space, x = orthonormal(1, M, 5), normal(2, 7, N)
    folders, updates = [], []
    for k in range(SOURCES):
        B, A = space @ normal(30 + k, 5, SOURCE_RANK), normal(40 + k, SOURCE_RANK, N)
        folders.append(save_source(tmp_path / str(k), layer_model(WEIGHT), {SITE: (B, A)}, 1.5))
        updates.append(0.5 * B @ A)
    model, handle = adapt(tuple(folders), rank=5, gain=gain)
    B, s = factor(handle), handle.parameterization(SITE).scale
    C = B / gain
    assert float((C @ C.T - space @ space.T).norm()) < 1e-10
    assert lost(updates, C) < 1e-20 * sum(float(update.square().sum()) for update in updates)  # energy 1
    for update in updates:
        put(handle, {"A": C.T @ update / (s * gain)})
        assert relative(handle.update_of(SITE).dense(), update) < 1e-10
        assert relative(model(x), x @ (WEIGHT + update).T) < 1e-10


def test_4_one_source_is_restored(sources) -> None:
    folders, updates = sources
    _, handle = adapt(folders[:1], rank=SOURCE_RANK)
    C = factor(handle)
    U = torch.linalg.svd(updates[0], full_matrices=False)[0][:, :SOURCE_RANK]
    assert float((C @ C.T - U @ U.T).norm()) < 1e-10
    put(handle, {"A": C.T @ updates[0] / handle.parameterization(SITE).scale})
    assert relative(handle.update_of(SITE).dense(), updates[0]) < 1e-12


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_5_start_and_first_gradients(sources, gain: float) -> None:
    folders, updates = sources
    x, cotangent, moved = normal(3, 8, N), normal(4, 8, M), {}
    for freeze in (True, False):
        model, handle = adapt(folders, gain=gain, freeze=freeze)
        assert torch.equal(model(x), nn.functional.linear(x, WEIGHT))
        assert set(handle.blocks()[SITE]) == ({"A"} if freeze else {"A", "B"})
        assert not roles_of(handle)["A"].any()
        B, s = factor(handle), handle.parameterization(SITE).scale
        C = left(updates)[0]
        assert float((B @ B.T - gain**2 * C @ C.T).norm()) < 1e-10
        optimizer = handle.optimizer(0.01)
        (model(x) * cotangent).sum().backward()
        block = handle.blocks()[SITE]
        assert block["A"].grad is not None
        assert relative(block["A"].grad, s * B.T @ cotangent.T @ x) < 1e-12
        if freeze:
            assert B.grad is None
        else:
            assert block["B"].grad is not None
            assert not block["B"].grad.any()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        moved[freeze] = handle.update_of(SITE).dense().detach()
    assert float(moved[True].norm()) > 0
    assert relative(moved[False], moved[True]) < 1e-12


def test_6_the_best_input_factor_leaves_what_is_outside(sources) -> None:
    folders, _ = sources
    goal, eye = normal(5, M, N), torch.eye(N, dtype=torch.float64)
    model, handle = adapt(folders, gain=2.0)
    B, s = factor(handle), handle.parameterization(SITE).scale
    C = B / 2.0
    outside = (goal - WEIGHT) - C @ (C.T @ (goal - WEIGHT))
    optimizer = torch.optim.LBFGS(list(handle.blocks()[SITE].values()), lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(eye) - goal.T).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float((model(eye) - goal.T).square().sum()) == pytest.approx(float(outside.square().sum()), rel=1e-10)
    assert relative(roles_of(handle)["A"], C.T @ (goal - WEIGHT) / (2.0 * s)) < 1e-5


def trajectory(folders: tuple[str, ...], steps: str, turn: Tensor | None) -> Tensor:
    """Update after ten steps in freeze mode, with B replaced by B·turn."""
    model, handle = adapt(folders, steps=steps)
    if turn is not None:
        with torch.no_grad():
            factor(handle).copy_(factor(handle) @ turn)
    optimizer = handle.optimizer(0.01)
    for step in range(10):
        x, y = normal(300 + step, 12, N), normal(400 + step, 12, M)
        (model(x) - y).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return handle.update_of(SITE).dense().detach()


def test_7_gauge_of_the_basis(sources) -> None:
    folders, turn = sources[0], orthonormal(6, RANK, RANK)
    assert relative(trajectory(folders, "sgd", turn), trajectory(folders, "sgd", None)) < 1e-10
    assert relative(trajectory(folders, "adamw", turn), trajectory(folders, "adamw", None)) > 1e-2


def test_whole_weights_as_sources(sources) -> None:
    """The definition's other reading: M_i is the whole weight of source i."""
    folders, updates = sources
    C = factor(adapt(folders, source="weight")[1])
    expected = left([WEIGHT + update for update in updates])[0]
    assert float((C @ C.T - expected @ expected.T).norm()) < 1e-10


@pytest.mark.parametrize(
    ("share", "groups"),
    [
        ("per_site", [["0.q"], ["0.v"], ["1.q"], ["1.v"]]),
        ("per_kind", [["0.q", "1.q"], ["0.v", "1.v"]]),
        ("global", [["0.q", "0.v", "1.q", "1.v"]]),
    ],
)
def test_what_is_stacked(tmp_path: Path, share: str, groups: list[list[str]]) -> None:
    sites = ["0.q", "0.v", "1.q", "1.v"]
    torch_layers = {site: normal(500 + k, 10, 8) for k, site in enumerate(sites)}

    def build() -> nn.ModuleList:
        model = nn.ModuleList([nn.ModuleDict({part: nn.Linear(8, 10, bias=False).double() for part in "qv"}) for _ in "01"])
        with torch.no_grad():
            for site, weight in torch_layers.items():
                model.get_submodule(site).weight.copy_(weight)
        return model

    folders, updates = [], {site: [] for site in sites}
    for k in range(3):
        factors = {site: (normal(600 + 10 * k + j, 10, 2), normal(700 + 10 * k + j, 2, 8)) for j, site in enumerate(sites)}
        folders.append(save_source(tmp_path / str(k), build(), factors, 2.0))
        for site, (B, A) in factors.items():
            updates[site].append(B @ A)
    recipe = rankwise.catalog.cora(sources=tuple(folders), rank=3, share=share)
    handle = rankwise.adapt_(build(), recipe, where=sites)
    for group in groups:
        expected = left([update for site in group for update in updates[site]], 3)[0]
        for site in group:
            C = factor(handle, site)
            assert float((C @ C.T - expected @ expected.T).norm()) < 1e-10


def test_the_share_of_energy_that_is_common(sources) -> None:
    """What the basis holds is Σ_{i≤r} S_i² / Σ S_i²; here it tells sources with a common space from those without."""
    folders, updates = sources
    C, S = factor(adapt(folders)[1]), left(updates)[1]
    kept = sum(float((C.T @ update).square().sum()) for update in updates)
    assert kept / sum(float(update.square().sum()) for update in updates) == pytest.approx(
        float(S[:RANK].square().sum() / S.square().sum()), rel=1e-10
    )
    assert relative(C @ C.T @ torch.cat(updates, 1), truncated(torch.cat(updates, 1), RANK)) < 1e-10
