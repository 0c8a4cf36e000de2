"""Oracles of SoRA: soft thresholds on the gates of a LoRA, against the paper's formulas."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.protocols import Assign, Freeze
from rankwise.schedules.sora import SoRA, prune, soft_threshold, sparsifying_ladder

GRID = torch.tensor([-3, -1.5, -0.5, 0.5, 1.5, 2.5, 3], dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7, dtype=torch.float64), nn.Linear(7, 5, dtype=torch.float64))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(9, 5, generator=generator, dtype=torch.float64)


def backward(model: nn.Module) -> None:
    x, y = data()
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, handle: rw.Handle, optimizer, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        handle.after_backward()
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()


def shrink(values: Tensor, amount: float) -> Tensor:
    """T_ξ entry by entry, as the minimizer of ½(g - v)² + ξ|g|."""
    result = torch.zeros_like(values)
    for i, v in enumerate(values.tolist()):
        candidates = [0.0, *([v - amount] if v - amount > 0 else []), *([v + amount] if v + amount < 0 else [])]
        result[i] = min(candidates, key=lambda g, v=v: 0.5 * (g - v) ** 2 + amount * abs(g))
    return result


def thresholded(gate: Tensor, schedule: SoRA, *, learning_rate: float = 1.0, step: int = 0) -> Tensor:
    """What the schedule makes of one gate."""
    decision = schedule.decide(step, {"layer": {"gate": gate}}, learning_rate=learning_rate)["layer"]
    assert isinstance(decision, Assign)
    return decision.values["gate"]


def test_1_the_soft_threshold_and_the_released_double_one():
    expected = torch.tensor([-2, -0.5, 0, 0, 0.5, 1.5, 2], dtype=torch.float64)
    released = torch.tensor([-2, 0, 0, 0, 0, 1.5, 2], dtype=torch.float64)
    assert torch.equal(soft_threshold(GRID, 1.0), expected)
    assert torch.equal(soft_threshold(GRID, 1.0, compat="released"), released)
    assert torch.equal(shrink(GRID, 1.0), expected)
    assert torch.equal(thresholded(GRID, SoRA(threshold=1.0)), expected)
    assert torch.equal(thresholded(GRID, SoRA(threshold=1.0, compat="released")), released)
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(soft_threshold(values, 0.3), shrink(values, 0.3))
    dead = soft_threshold(values, 0.3, compat="released") == 0  # everything below 2ξ dies
    assert torch.equal(dead, values.abs() < 0.6)


def test_1_the_papers_form_has_the_learning_rate_in_the_threshold():
    assert torch.equal(thresholded(GRID, SoRA(threshold=4.0, mode="learning_rate"), learning_rate=0.25), shrink(GRID, 1.0))
    assert torch.equal(thresholded(GRID, SoRA(threshold=1.0, mode="constant"), learning_rate=0.25), shrink(GRID, 1.0))


def test_2_with_open_gates_and_no_threshold_it_is_lora():
    model, reference = network(), network()
    handle = rw.adapt_(model, rw.catalog.sora(rank=3, threshold=0.0, alpha=6.0), seed=4)
    plain = rw.adapt_(reference, rw.catalog.lora(rank=3, alpha=6.0), seed=4)
    for site, block in handle.blocks().items():
        block["gate"].data.fill_(1.0)
        for role in ("A", "B"):
            plain.blocks()[site][role].data.copy_(block[role])
    optimizer = handle.optimizer(lr=0.02)
    handle.apply_({site: Freeze(frozenset({"gate"})) for site in handle.targets})
    train(model, handle, optimizer, 6)
    train(reference, plain, plain.optimizer(lr=0.02), 6)
    for site, block in plain.blocks().items():
        assert block["B"].abs().max() > 0.01
        for role, tensor in block.items():
            assert (handle.blocks()[site][role] - tensor).abs().max() < 1e-12
        assert (handle.update_of(site).dense() - plain.update_of(site).dense()).abs().max() < 1e-12
    assert (model(data()[0]) - reference(data()[0])).abs().max() < 1e-12


@pytest.mark.parametrize("c", [2.0, 0.7, 0.2, 0.0, -0.2, -1.9])
def test_3_the_scalar_lasso_is_solved_in_one_step(c):
    """½(g - c)² + λ|g| by a gradient step of length 1 and the threshold."""
    lam = 0.5
    for start in (3.0, -1.0):
        gate = torch.tensor([start], dtype=torch.float64)
        gate = gate - 1.0 * (gate - c)
        solution = thresholded(gate, SoRA(threshold=lam, mode="learning_rate"), learning_rate=1.0)
        assert (solution - shrink(torch.tensor([c], dtype=torch.float64), lam)).abs() < 1e-12
        again = solution - 1.0 * (solution - c)
        assert (thresholded(again, SoRA(threshold=lam)) - solution).abs() < 1e-12


def test_4_cutting_away_zero_gates_changes_nothing():
    model = network()
    handle = rw.adapt_(model, rw.catalog.sora(rank=4, alpha=16.0), seed=3)
    generator = torch.Generator().manual_seed(8)
    for block in handle.blocks().values():
        block["B"].data.copy_(torch.randn(block["B"].shape, generator=generator, dtype=torch.float64))
    closed = {"0": [1, 3], "1": [0, 1, 2, 3]}
    for site, zeros in closed.items():
        handle.blocks()[site]["gate"].data.view(-1)[zeros] = 0.0
    x = data()[0]
    before = model(x).detach()
    updates = {}
    for site, block in handle.blocks().items():
        gate = block["gate"].detach().flatten()
        keep = gate != 0
        s = 16.0 / 4  # alpha over the starting rank, whatever is left
        updates[site] = s * block["B"].detach()[:, keep] @ (torch.diag(gate[keep]) @ block["A"].detach()[keep])
        assert (handle.update_of(site).dense() - updates[site]).abs().max() < 1e-10
    exported = network()
    for site, update in updates.items():
        exported.get_submodule(site).weight.data += update
    assert (exported(x) - before).abs().max() < 1e-6
    assert prune(handle) == {"0": 2, "1": 0}
    assert (model(x) - before).abs().max() < 1e-6
    for site, update in updates.items():
        assert handle.blocks()[site]["A"].shape[0] == 4 - len(closed[site])
        assert (handle.update_of(site).dense() - update).abs().max() < 1e-10
        factors = handle.low_rank_of(site)
        assert factors is not None
        assert (factors.B @ factors.A - update).abs().max() < 1e-10


def test_5_a_larger_threshold_never_leaves_more_gates():
    """½‖B diag(g) A - M‖² with orthonormal B and A fixed: trained through the library, and the closed form."""
    generator = torch.Generator().manual_seed(6)
    M = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    B = torch.linalg.qr(torch.randn(7, 4, generator=generator, dtype=torch.float64)).Q
    A = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64)).Q.T
    goal = (B.T @ M @ A.T).diagonal()
    counts = []
    for xi in (0.0, 0.2, 0.4, 0.8, 1.6, 3.2):
        model = nn.Sequential(nn.Linear(6, 7, bias=False, dtype=torch.float64))
        nn.init.zeros_(model[0].weight)
        recipe = rw.compose(rw.catalog.sora(rank=4, threshold=xi, mode="learning_rate", alpha=4.0), rw.catalog.sgd())
        handle = rw.adapt_(model, recipe)
        optimizer = handle.optimizer(lr=0.5)
        block = handle.blocks()["0"]
        block["A"].data.copy_(A)
        block["B"].data.copy_(B)
        handle.apply_({"0": Freeze(frozenset({"A", "B"}))})
        for _ in range(60):
            (0.5 * (model(torch.eye(6, dtype=torch.float64)).T - M).square().sum()).backward()
            handle.after_backward()
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        gate = handle.blocks()["0"]["gate"].detach().flatten()
        assert (gate - shrink(goal, xi)).abs().max() < 1e-9
        counts.append(int((gate != 0).sum()))
    assert counts[0] == 4
    assert counts[-1] == 0
    assert len(set(counts)) > 2
    assert all(later <= sooner for sooner, later in itertools.pairwise(counts))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_6_the_first_step_only_shrinks_the_gates(optimizer):
    model = network()
    recipe = rw.compose(rw.catalog.sora(rank=3, threshold=0.07), getattr(rw.catalog, optimizer)())
    base = model(data()[0])
    handle = rw.adapt_(model, recipe, seed=2)
    assert torch.equal(model(data()[0]), base)
    before = {site: block["gate"].detach().clone() for site, block in handle.blocks().items()}
    backward(model)
    for block in handle.blocks().values():
        assert not block["B"].any()
        assert not block["gate"].grad.any()
        assert block["B"].grad.any()
    made = handle.optimizer(lr=0.1)
    handle.after_backward()
    made.step()
    handle.after_step()
    for site, block in handle.blocks().items():
        assert torch.equal(block["gate"].detach(), shrink(before[site], 0.07))
        assert block["B"].abs().max() > 0


def test_the_loss_term_is_the_mean_of_absolute_gates():
    """λ₁/N·Σ|g| with N the gates of the whole model: its gradient is added to the loss's."""
    model = network()
    recipe = rw.compose(rw.catalog.sora(rank=3, threshold=0.0, l1=0.6), rw.catalog.sgd())
    handle = rw.adapt_(model, recipe, seed=2)
    for block in handle.blocks().values():
        block["B"].data.fill_(0.3)
    backward(model)
    before = {site: block["gate"].grad.clone() for site, block in handle.blocks().items()}
    handle.after_backward()
    for site, block in handle.blocks().items():
        assert (block["gate"].grad - before[site] - 0.6 / 6 * block["gate"].sign()).abs().max() < 1e-12


def test_weight_decay_does_not_reach_the_gate():
    model = network()
    handle = rw.adapt_(model, rw.catalog.sora(rank=3, threshold=0.0), seed=2)
    optimizer = handle.optimizer(lr=0.1, weight_decay=0.5)
    before = {site: block["gate"].detach().clone() for site, block in handle.blocks().items()}
    backward(model)
    handle.after_backward()
    optimizer.step()
    for site, block in handle.blocks().items():
        assert torch.equal(block["gate"].detach(), before[site])


def test_the_ladder_of_thresholds():
    for spacing in ("linear", "log", "exp"):
        ladder = sparsifying_ladder(1e-4, 1e-2, 5, spacing=spacing)
        assert len(ladder) == 5
        assert (ladder[0], ladder[-1]) == (pytest.approx(1e-4), pytest.approx(1e-2))
        assert all(later > sooner for sooner, later in itertools.pairwise(ladder))
    ladder = sparsifying_ladder(0.1, 0.5, 3)
    schedule = SoRA(threshold=ladder, rung_steps=2)
    for step, xi in enumerate((0.1, 0.1, 0.3, 0.3, 0.5, 0.5, 0.5)):
        assert (thresholded(GRID, schedule, step=step) - shrink(GRID, xi)).abs().max() < 1e-12
