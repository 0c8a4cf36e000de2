"""RAC-LoRA against its spec (arXiv:2410.08305): a chain of blocks, in each one factor is drawn and frozen, the other trained.

side="A" freezes B (left sketch), side="B" freezes A (right sketch). Inner problems are solved exactly by hand where an oracle
says so; the statistics are over the library's own draws, several hundred layers at once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.handle import Handle
from tests.oracles.tools_training import SITE, layer_model, normal, relative

M, N, RANK, SCALE = 6, 5, 2, 2.0
START, GOAL = normal(0, M, N), normal(1, M, N)
SIDES = ["A", "B"]
DRAWS = ["gaussian", "orthonormal"]
EYE = torch.eye(6, dtype=torch.float64)


def begin(weight: Tensor = START, *, rank: int = RANK, seed: int = 0, lr: float = 0.0, step: str = "sgd", **options):
    options = {"interval": 1, "alpha": SCALE * rank, **options}
    model = layer_model(weight)
    recipe = rankwise.compose(rankwise.catalog.rac_lora(rank=rank, **options), step)
    handle = rankwise.adapt_(model, recipe, seed=seed)
    return model, handle, handle.optimizer(lr)


def pair(handle: Handle, site: str = SITE) -> dict[str, Tensor]:
    """Both factors, the frozen one too."""
    entry = handle.parameterization(site)
    found: dict[str, Tensor] = {**dict(entry.named_buffers()), **dict(entry.named_parameters())}
    return {role: found[role] for role in "AB"}


def frozen(handle: Handle, side: str, site: str = SITE) -> Tensor:
    return pair(handle, site)["B" if side == "A" else "A"].detach().clone()


def projector(factor: Tensor, side: str) -> Tensor:
    """H_B (m, m) or H_A (n, n)."""
    return factor @ torch.linalg.pinv(factor) if side == "A" else torch.linalg.pinv(factor) @ factor


def best(factor: Tensor, side: str, gap: Tensor, scale: float) -> Tensor:
    """The trained factor that solves the inner problem ½‖gap - s B A‖² exactly."""
    inverse = torch.linalg.pinv(factor)
    return (inverse @ gap if side == "A" else gap @ inverse) / scale


def project(gap: Tensor, factor: Tensor, side: str) -> Tensor:
    return projector(factor, side) @ gap if side == "A" else gap @ projector(factor, side)


def effective(handle: Handle, weight: Tensor, site: str = SITE) -> Tensor:
    return weight + handle.update_of(site).dense().detach()


def end_block(handle: Handle, optimizer, values: dict[str, Tensor], side: str) -> None:
    """One optimizer step of rate 0, then the trained factors are put in, then the block ends."""
    optimizer.step()
    with torch.no_grad():
        blocks = handle.blocks()
        for site, value in values.items():
            blocks[site][side].copy_(value)
    handle.after_step()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("draw", DRAWS)
def test_1_an_exact_inner_solution_projects_the_error(side: str, draw: str) -> None:
    _, handle, optimizer = begin(side=side, draw=draw)
    for _ in range(4):
        before, factor = effective(handle, START), frozen(handle, side)
        assert set(handle.blocks()[SITE]) == {side}
        assert not handle.blocks()[SITE][side].any()
        end_block(handle, optimizer, {SITE: best(factor, side, GOAL - before, SCALE)}, side)
        error = before - GOAL
        assert float((effective(handle, START) - GOAL - (error - project(error, factor, side))).norm()) < 1e-12
        assert not torch.equal(frozen(handle, side), factor)


def chains(count: int, blocks: int, side: str, draw: str) -> tuple[list[Tensor], list[Tensor], float]:
    """All frozen factors of many chains of exact solutions, the last errors, and the scale."""
    model = nn.Sequential(*[nn.Linear(N, M, bias=False, dtype=torch.float64) for _ in range(count)])
    weights = {str(k): layer.weight.detach().clone() for k, layer in enumerate(model)}
    recipe = rankwise.catalog.rac_lora(rank=RANK, interval=1, side=side, draw=draw)
    handle = rankwise.adapt_(model, rankwise.compose(recipe, "sgd"), seed=3)
    optimizer, draws = handle.optimizer(0.0), []
    scale = handle.parameterization("0").scale
    gaps = {site: normal(50, M, N) for site in weights}  # W* - W_t
    for _ in range(blocks):
        factors = {site: frozen(handle, side, site) for site in weights}
        draws += factors.values()
        end_block(handle, optimizer, {site: best(factors[site], side, gaps[site], scale) for site in weights}, side)
        gaps = {site: gaps[site] - project(gaps[site], factors[site], side) for site in weights}
    errors = [gaps[site] for site in weights]
    for site in list(weights)[:5]:  # the library has taken the same way
        moved = handle.update_of(site).dense().detach()
        assert relative(moved, normal(50, M, N) - gaps[site]) < 1e-10
    return draws, errors, scale


@pytest.fixture(scope="module")
def many() -> tuple[list[Tensor], list[Tensor], float]:
    return chains(160, 5, "A", "gaussian")


def test_2_the_mean_projector_of_the_draws(many) -> None:
    """(r/m) I. An entry has a standard deviation of at most 0.24, so 0.035 is 4 standard errors of 800 draws."""
    mean = torch.stack([projector(factor, "A") for factor in many[0]]).mean(0)
    assert float((mean - RANK / M * EYE).abs().max()) < 0.035


def test_2_the_mean_projector_of_gaussian_sketches() -> None:
    """The statement itself, with enough plain draws to see 0.01."""
    B = normal(2, 20_000, M, RANK)
    Q = torch.linalg.qr(B)[0]
    assert float(((Q @ Q.mT).mean(0) - RANK / M * EYE).abs().max()) < 0.01


def test_3_the_error_contracts_in_the_mean(many) -> None:
    """(1 - r/m)^t = 0.1317 for m = 6, r = 2, t = 5, over 160 chains (standard error about 0.0065)."""
    first = float(normal(50, M, N).square().sum())
    mean = sum(float(error.square().sum()) / first for error in many[1]) / len(many[1])
    contraction = (1 - RANK / M) ** 5
    assert contraction == pytest.approx(0.1317, abs=1e-4)
    assert mean == pytest.approx(contraction, abs=0.025)


@pytest.mark.parametrize("side", SIDES)
def test_4_the_rank_grows_by_r_per_block(side: str) -> None:
    _, handle, optimizer = begin(side=side)
    for expected in (2, 4, 5, 5):
        gap = GOAL - effective(handle, START)
        solution = best(frozen(handle, side), side, gap, SCALE)
        if float(gap.norm()) < 1e-9:
            break
        end_block(handle, optimizer, {SITE: solution}, side)
        update = handle.update_of(SITE).dense()
        assert int(torch.linalg.matrix_rank(update, rtol=1e-9)) == expected
        factors = handle.low_rank_of(SITE)
        assert factors is not None
        assert relative(factors.dense(), update) < 1e-12


@pytest.mark.parametrize("side", SIDES)
def test_4_one_sketch_for_ever_stalls(side: str) -> None:
    """Without a new draw gradient descent ends at ‖(I - H)(W - W*)‖², at rank r."""
    model, handle, optimizer = begin(side=side, interval=100_000, lr=0.01, draw="orthonormal")
    factor = frozen(handle, side)
    eye = torch.eye(N, dtype=torch.float64)
    for _ in range(300):
        (model(eye) - GOAL.T).square().sum().backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    gap = GOAL - START
    stalled = float((gap - project(gap, factor, side)).square().sum())
    assert float((model(eye) - GOAL.T).square().sum()) == pytest.approx(stalled, rel=1e-9)
    assert torch.equal(frozen(handle, side), factor)
    assert int(torch.linalg.matrix_rank(handle.update_of(SITE).dense(), rtol=1e-9)) == RANK


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("draw", DRAWS)
def test_5_one_plain_step_is_not_the_projector(side: str, draw: str) -> None:
    lr, x, cotangent = 0.01, normal(3, 8, N), normal(4, 8, M)
    model, handle, optimizer = begin(side=side, draw=draw, lr=lr)
    factor, G = frozen(handle, side), cotangent.T @ x
    (model(x) * cotangent).sum().backward()
    assert all(tensor.grad is None for role, tensor in pair(handle).items() if role != side)
    handle.after_backward()
    optimizer.step()
    expected = -lr * SCALE**2 * (factor @ factor.T @ G if side == "A" else G @ factor.T @ factor)
    assert relative(handle.update_of(SITE).dense(), expected) < 1e-12
    handle.after_step()
    assert relative(handle.update_of(SITE).dense(), expected) < 1e-12  # and the new block changes nothing


def test_5_moments_of_gaussian_sketches(many) -> None:
    """N(0, 1/r) entries: E[B Bᵀ] = I and E[(B Bᵀ)²] = (1 + (m + 1)/r) I, 4.5 for m = 6, r = 2."""
    squares = torch.stack([B @ B.T for B in many[0]])  # 800 draws
    assert float((squares.mean(0) - EYE).abs().max()) < 0.16  # an entry's standard deviation is at most √(2/r) = 1
    assert float(squares.diagonal(dim1=1, dim2=2).mean()) == pytest.approx(1.0, abs=0.05)
    second = (squares @ squares).diagonal(dim1=1, dim2=2).mean()
    assert float(second) == pytest.approx(1 + (M + 1) / RANK, rel=0.1)


def test_5_moments_of_gaussian_sketches_in_many_draws() -> None:
    B = normal(5, 40_000, M, RANK) / RANK**0.5
    squares = B @ B.mT
    assert float((squares.mean(0) - EYE).abs().max()) < 0.03
    assert float(((squares @ squares).mean(0) - 4.5 * EYE).abs().max()) < 0.25


@pytest.mark.parametrize(("side", "size"), [("A", M), ("B", N)])
def test_5_moments_of_orthonormal_sketches(side: str, size: int) -> None:
    """Scaled by √(m/r), B Bᵀ is m/r times a projector, so its mean is I and its second moment (m/r) I.

    The definition draws orthonormal columns; the scaling is that of this statement, so it is applied here.
    """
    frames = [factor if side == "A" else factor.T for factor in chains(50, 2, side, "orthonormal")[0]]
    assert all(float((Q.T @ Q - torch.eye(RANK, dtype=torch.float64)).abs().max()) < 1e-12 for Q in frames)
    draws = [(size / RANK) ** 0.5 * Q for Q in frames]
    for B in draws:
        assert float((B.T @ B - size / RANK * torch.eye(RANK, dtype=torch.float64)).abs().max()) < 1e-12
        assert relative(B @ B.T @ B @ B.T, size / RANK * B @ B.T) < 1e-12
    mean = torch.stack([B @ B.T for B in draws]).mean(0)
    assert float((mean - torch.eye(size, dtype=torch.float64)).abs().max()) < 0.3  # 100 draws, standard error below 0.08


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_6_a_new_block_does_not_move_the_output(side: str, dtype: torch.dtype, tolerance: float) -> None:
    weight, x = START.to(dtype), normal(6, 7, N).to(dtype)
    model, handle, optimizer = begin(weight, side=side, interval=3, lr=0.05)
    assert torch.equal(model(x), nn.functional.linear(x, weight))
    for step in range(6):
        (model(x) - normal(7, 7, M).to(dtype)).square().mean().backward()
        optimizer.step()
        before, old = model(x).detach(), frozen(handle, side)
        handle.after_step()
        optimizer.zero_grad()
        assert relative(model(x), before) <= tolerance
        if step % 3 == 2:
            assert not torch.equal(frozen(handle, side), old)
            assert not handle.blocks()[SITE][side].any()
            # the trained factor is zero, so the new draw has no part in the output, to the bit
            assert torch.equal(model(x), nn.functional.linear(x, model.get_submodule(SITE).weight))
            expected = weight + handle.update_of(SITE).dense().detach()
            assert relative(model.get_submodule(SITE).weight, expected) <= tolerance
        else:
            assert torch.equal(frozen(handle, side), old)


@pytest.mark.parametrize("side", SIDES)
def test_6_moments_of_the_old_coordinates_are_forgotten(side: str) -> None:
    x = normal(6, 7, N)
    model, handle, optimizer = begin(side=side, interval=2, lr=0.05, step="adamw")
    for step in range(4):
        (model(x) - normal(7, 7, M)).square().mean().backward()
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
        state = optimizer.state[handle.blocks()[SITE][side]]
        shaped = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
        assert all(bool(value.any()) == (step % 2 == 0) for value in shaped)
        assert shaped or step % 2


@pytest.mark.parametrize(("side", "rank"), [("A", M), ("B", N)])
@pytest.mark.parametrize("draw", DRAWS)
def test_7_a_square_sketch_arrives_in_one_block(side: str, rank: int, draw: str) -> None:
    weight, goal = normal(8, rank, rank), normal(9, rank, rank)
    _, handle, optimizer = begin(weight, rank=rank, side=side, draw=draw, alpha=float(rank))
    end_block(handle, optimizer, {SITE: best(frozen(handle, side), side, goal - weight, 1.0)}, side)
    assert relative(effective(handle, weight), goal) < 1e-10


@pytest.mark.parametrize("side", SIDES)
def test_8_clients_with_one_seed_average_exactly(side: str) -> None:
    """mean_i s B A_i = s B mean_i A_i, in every block, since all clients draw the same factor."""
    clients = [begin(side=side, interval=2, lr=0.05, seed=7) for _ in range(3)]
    other = begin(side=side, interval=2, seed=8)[1]
    for step in range(4):
        for k, (model, handle, optimizer) in enumerate(clients):
            (model(normal(10 + k, 9, N)) - normal(20 + k, 9, M)).square().mean().backward()
            optimizer.step()
            if step % 2 == 0:
                handle.after_step()
                optimizer.zero_grad()
        if step % 2:  # the end of a block, before it is absorbed
            shared = frozen(clients[0][1], side)
            trained = [handle.blocks()[SITE][side].detach().clone() for _, handle, _ in clients]
            assert all(torch.equal(frozen(handle, side), shared) for _, handle, _ in clients)
            assert relative(trained[0], trained[1]) > 1e-3
            mean = sum(trained) / 3
            product = SCALE * (shared @ mean if side == "A" else mean @ shared)
            singles = [SCALE * pair(handle)["B"] @ pair(handle)["A"] for _, handle, _ in clients]
            assert relative(product, sum(singles) / 3) < 1e-14
            for _, handle, optimizer in clients:
                handle.after_step()
                optimizer.zero_grad()
            assert not torch.equal(frozen(clients[0][1], side), shared)
    assert not torch.equal(frozen(other, side), frozen(begin(side=side, seed=7)[1], side))
