"""AFLoRA against its spec (arXiv:2403.13269): y = W x + diag(v) B diag(u) A x, where A and B are frozen one by one by a score.

Steps are counted from 0 here and from 1 elsewhere, and the spec leaves open whether a window holds the gradient it ends with;
freezing times are compared with the loop of the spec under each of these readings. Speed and accuracy claims are not tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.core.protocols import Freeze
from tests.oracles.tools import close, fill, grad, linear, put, randn

aflora = rw.catalog.aflora
Key = tuple[str, str]
RATE = 0.002  # of gradient descent


def rho(t: int, total: int, epochs: int, warmup: int, final: int) -> float:
    """The share of entries that keep training, by the formula of the spec."""
    per_epoch = total // epochs
    if t <= warmup * per_epoch:
        return 1.0
    if t > total - final * per_epoch:
        return 0.0
    return (1 - (t - warmup * per_epoch) / (total - (warmup + final) * per_epoch)) ** 3


def reference(
    gradients: Callable[[int], Mapping[Key, Tensor]],
    total: int,
    epochs: int,
    *,
    warmup: int,
    final: int,
    interval: int,
    smoothing: float,
    uncertainty: float,
    offset: int,
    inclusive: bool,
) -> dict[Key, int]:
    """Tensor -> the step at which it is frozen: windows of mean |g|, two running means, entry-wise threshold, tensor-wise mean.

    `offset` is the number of the first step; `inclusive` says whether a window holds the gradient of the step it ends at.
    """
    average: dict[Key, Tensor] = {}
    uncertain: dict[Key, Tensor] = {}
    window: dict[Key, list[Tensor]] = {}
    frozen: dict[Key, int] = {}
    for step in range(total):
        t = step + offset
        live = {key: g.abs() for key, g in gradients(step).items() if key not in frozen}
        if not live:
            break
        for key, g in live.items():
            zero = torch.zeros_like(g)
            mine = window.setdefault(key, [])
            average.setdefault(key, zero)
            uncertain.setdefault(key, zero)
            if inclusive:
                mine.append(g)
            if t % interval == 0:
                mean = torch.stack(mine).mean(0) if mine else zero
                average[key] = smoothing * average[key] + (1 - smoothing) * mean
                uncertain[key] = uncertainty * uncertain[key] + (1 - uncertainty) * (mean - average[key]).abs()
                mine.clear()
            if not inclusive:
                mine.append(g)
        share = rho(t, total, epochs, warmup, final)
        if share == 1.0 or (share > 0.0 and t % interval):
            continue
        scores = {key: average[key] * uncertain[key] for key in live}
        entries = torch.cat([score.flatten() for score in scores.values()])
        k = int(len(entries) * (1 - share))
        if k == 0:
            continue
        threshold = entries.kthvalue(k).values
        frozen |= {key: step for key, score in scores.items() if score.mean() < threshold}
    return frozen


READINGS = [{"offset": 0, "inclusive": False}, {"offset": 1, "inclusive": False}, {"offset": 1, "inclusive": True}]


def schedule_alone(
    gradients: Callable[[int], Mapping[Key, Tensor]],
    shapes: Mapping[Key, tuple[int, ...]],
    total: int,
    epochs: int,
    **options: Any,
) -> dict[Key, int]:
    """What the library's schedule freezes when, fed with these gradients."""
    recipe = aflora(rank=2, total_steps=total, epochs=epochs, **options)
    assert recipe.schedule is not None
    schedule = recipe.schedule.build()
    blocks: dict[str, dict[str, nn.Parameter]] = {}
    for (site, role), shape in shapes.items():
        blocks.setdefault(site, {})[role] = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    for block in blocks.values():
        block |= {"u": nn.Parameter(torch.ones(2)), "v": nn.Parameter(torch.ones(2))}
    frozen: dict[Key, int] = {}
    for step in range(total):
        for (site, role), g in gradients(step).items():
            if role in blocks[site]:
                blocks[site][role].grad = g.clone()
        for block in blocks.values():
            block["u"].grad, block["v"].grad = torch.full((2,), 1e3), torch.full((2,), 1e-9)  # these play no part
        schedule.before_step(step, blocks)
        for site, decision in schedule.decide(step, blocks, learning_rate=0.1).items():
            if not isinstance(decision, Freeze):
                continue
            for role in decision.roles & set(blocks[site]):
                assert role in ("A", "B")
                frozen[site, role] = step
                tensor = blocks[site].pop(role)
                tensor.requires_grad_(False)
                tensor.grad = None
        if all(not {"A", "B"} & set(block) for block in blocks.values()):
            break
    return frozen


def network(*sizes: int, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(*[linear(m, n, seed=seed + k) for k, (n, m) in enumerate(itertools.pairwise(sizes))])


def factors(handle: rw.Handle, site: str) -> dict[str, Tensor]:
    """A, B, u, v, frozen or not."""
    entry = handle.parameterization(site)
    found: dict[str, Tensor] = {**dict(entry.named_buffers()), **dict(entry.named_parameters())}
    return {role: found[role] for role in ("A", "B", "u", "v")}


def delta(roles: Mapping[str, Tensor]) -> Tensor:
    return roles["v"][:, None] * (roles["B"] @ (roles["u"][:, None] * roles["A"]))


class ByHand:
    """The same model in plain torch, trained by plain gradient descent on the roles named."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], roles: list[dict[str, Tensor]], trained: str) -> None:
        self.layers = layers
        self.roles = [
            {role: tensor.detach().clone().requires_grad_(role in trained) for role, tensor in kept.items()} for kept in roles
        ]

    def __call__(self, x: Tensor) -> Tensor:
        for (W, b), roles in zip(self.layers, self.roles, strict=True):
            x = x @ (W + delta(roles)).t() + b
        return x

    def step(self, x: Tensor, y: Tensor) -> None:
        tensors = [tensor for roles in self.roles for tensor in roles.values() if tensor.requires_grad]
        gradients = torch.autograd.grad((self(x) - y).square().mean(), tensors)
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor -= RATE * gradient


def batch(step: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    return randn(11, n, seed=1000 + step), randn(11, m, seed=2000 + step)


def advance(model: nn.Module, handle: rw.Handle, optimizer: Any, step: int, n: int, m: int) -> None:
    x, y = batch(step, n, m)
    (model(x) - y).square().mean().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()


def begin(*sizes: int, lr: float = RATE, optimizer: str = "sgd", rank: int = 3, **options: Any):
    model = network(*sizes)
    layers = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in model]
    handle = rw.adapt_(model, rw.compose(aflora(rank=rank, **options), optimizer))
    return model, layers, handle, handle.optimizer(lr)


def test_1_start():
    model, layers, handle, _ = begin(5, 7, 4, total_steps=20, epochs=4, final_epochs=1)
    x, base = randn(11, 5, seed=1), network(5, 7, 4)
    assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    for site, (W, _) in zip(("0", "1"), layers, strict=True):
        m, n = W.shape
        roles = factors(handle, site)
        assert [tuple(roles[role].shape) for role in "ABuv"] == [(3, n), (m, 3), (3,), (m,)]
        assert torch.equal(roles["u"], torch.full((3,), 0.1, dtype=torch.float64)) and not roles["v"].any()
        assert set(handle.blocks()[site]) == {"A", "B", "u", "v"}
        assert grad(roles["v"]).abs().max() > 0  # and no other tensor moves in the first step
        assert not any(grad(roles[role]).any() for role in "ABu")


def test_1_projections_start_kaiming_uniform():
    _, _, handle, _ = begin(60, 90, rank=40, total_steps=20, epochs=4, final_epochs=1)
    roles = factors(handle, "0")
    for role, fan_in in (("A", 60), ("B", 40)):
        bound = (6 / fan_in) ** 0.5
        assert 0.99 * bound < float(roles[role].abs().max()) <= bound
        assert float(roles[role].std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_1_before_anything_is_frozen_all_four_are_trained():
    model, layers, handle, optimizer = begin(5, 7, 4, total_steps=40, epochs=4, warmup_epochs=3, final_epochs=0)
    other = ByHand(layers, [factors(handle, site) for site in ("0", "1")], "ABuv")
    for step in range(25):
        advance(model, handle, optimizer, step, 5, 4)
        other.step(*batch(step, 5, 4))
    for site, roles in zip(("0", "1"), other.roles, strict=True):
        for role, tensor in factors(handle, site).items():
            close(tensor, roles[role].detach(), 1e-10)
        close(handle.update_of(site).dense(), delta(roles).detach(), 1e-10)


def test_1_after_full_freezing_it_is_vera_with_projections_of_its_own():
    options = {"total_steps": 24, "epochs": 12, "warmup_epochs": 1, "final_epochs": 8, "interval": 2}
    model, layers, handle, optimizer = begin(5, 7, 4, **options)
    for step in range(18):
        advance(model, handle, optimizer, step, 5, 4)
    assert all(set(block) == {"u", "v"} for block in handle.blocks().values()) and len(handle.blocks()) == 2
    other = ByHand(layers, [factors(handle, site) for site in ("0", "1")], "uv")
    close(model(batch(0, 5, 4)[0]).detach(), other(batch(0, 5, 4)[0]).detach(), 1e-12)
    for step in range(18, 24):
        advance(model, handle, optimizer, step, 5, 4)
        other.step(*batch(step, 5, 4))
    for site, roles in zip(("0", "1"), other.roles, strict=True):
        for role, tensor in factors(handle, site).items():
            close(tensor.detach(), roles[role].detach(), 1e-6)


def test_1_square_layers_are_vera_from_the_start():
    """The rule of the release: projections are trained only where n ≠ m."""
    model, layers, handle, optimizer = begin(5, 5, 7, total_steps=20, epochs=4, final_epochs=1)
    assert set(handle.blocks()["0"]) == {"u", "v"} and set(handle.blocks()["1"]) == {"A", "B", "u", "v"}
    before = {role: factors(handle, "0")[role].clone() for role in "AB"}
    model, layers, handle, optimizer = begin(5, 5, total_steps=20, epochs=4, final_epochs=1)
    other = ByHand(layers, [factors(handle, "0")], "uv")
    for step in range(20):
        advance(model, handle, optimizer, step, 5, 5)
        other.step(*batch(step, 5, 5))
    for role, tensor in factors(handle, "0").items():
        close(tensor.detach(), other.roles[0][role].detach(), 1e-10)
    assert all(before[role].abs().max() > 0 for role in "AB")


def constant_gradients(count: int, seed: int = 3) -> dict[Key, Tensor]:
    """One size per tensor, different between tensors."""
    sizes = (torch.rand(2 * count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).exp()
    keys = [(f"site{k}", role) for k in range(count) for role in "AB"]
    return {key: torch.full((2, 2), float(size), dtype=torch.float64) for key, size in zip(keys, sizes, strict=True)}


def test_2_schedule_of_the_paper():
    options = {"warmup": 1, "final": 14}
    found = [rho(t, 2000, 20, **options) for t in (100, 200, 300, 400, 500, 601, 2000)]
    assert found == pytest.approx([1, 0.512, 0.216, 0.064, 0.008, 0, 0], abs=1e-12)
    gradients = constant_gradients(20)
    shapes = dict.fromkeys(gradients, (2, 2))
    found = schedule_alone(lambda step: gradients, shapes, 2000, 20)
    rest = {"interval": 10, "smoothing": 0.85, "uncertainty": 0.95}
    expected = [reference(lambda step: gradients, 2000, 20, **options, **rest, **reading) for reading in READINGS]
    assert found in expected
    assert len(found) >= 39 and len(set(found.values())) > 8  # spread over the ramp


def test_3_what_is_frozen_stays_and_all_of_it_freezes():
    options = {"total_steps": 40, "epochs": 20, "warmup_epochs": 2, "final_epochs": 10, "interval": 2}
    model, _, handle, _ = begin(5, 7, 4, 6, optimizer="adamw", **options)
    optimizer = handle.optimizer(lr=0.02, weight_decay=0.5)
    kept: dict[Key, Tensor] = {}
    history = []
    for step in range(40):
        advance(model, handle, optimizer, step, 5, 6)
        for site in ("0", "1", "2"):
            for role in "AB":
                tensor = factors(handle, site)[role]
                if not tensor.requires_grad:
                    kept.setdefault((site, role), tensor.detach().clone())
                    assert torch.equal(tensor, kept[site, role]) and tensor.grad is None
                    assert tensor not in optimizer.state
                    assert role not in handle.blocks()[site]
                else:
                    assert (site, role) not in kept and len(optimizer.state[tensor]) > 0
        history.append(len(kept))
    assert history == sorted(history) and history[3] == 0
    assert history[22] == 6  # everything at the first checks of the tail, t > 20
    assert all(factors(handle, site)[role].requires_grad for site in ("0", "1", "2") for role in "uv")


def noisy(shapes: Mapping[Key, tuple[int, ...]], sizes: Mapping[Key, float]) -> Callable[[int], Mapping[Key, Tensor]]:
    """Gradients whose size changes from tensor to tensor, entry to entry and step to step, with both signs."""

    def at(step: int) -> Mapping[Key, Tensor]:
        return {
            key: sizes[key] * randn(*shape, seed=7000 + 31 * step + k) * (1 + (step // 7 + k) % 3)
            for k, (key, shape) in enumerate(shapes.items())
        }

    return at


@pytest.mark.parametrize(("smoothing", "uncertainty"), [(0.85, 0.95), (0.5, 0.3)])
@pytest.mark.parametrize("interval", [5, 8])
def test_4_scores_against_a_loop(smoothing: float, uncertainty: float, interval: int):
    shapes: dict[Key, tuple[int, ...]] = {}
    for k in range(8):
        shapes[f"s{k}", "A"], shapes[f"s{k}", "B"] = (2, 3 + k), (4, 2)
    sizes = {key: 0.6 + 0.05 * k for k, key in enumerate(shapes)}
    gradients = noisy(shapes, sizes)
    ramp = {"warmup": 2, "final": 3}
    arguments = {"warmup_epochs": 2, "final_epochs": 3, "interval": interval}
    arguments |= {"smoothing": smoothing, "uncertainty_smoothing": uncertainty}
    found = schedule_alone(gradients, shapes, 240, 12, **arguments)
    rest = {"interval": interval, "smoothing": smoothing, "uncertainty": uncertainty}
    expected = [reference(gradients, 240, 12, **ramp, **rest, **reading) for reading in READINGS]
    assert found in expected
    assert len(found) >= 15 and len(set(found.values())) >= 4


def test_4_a_constant_gradient_in_closed_form():
    """Ī_k = c (1 - b₁^k); Ū smooths |c - Ī_k| = c b₁^k with b₂: checked on the loop above."""
    c, b1, b2, average, uncertain = 2.0, 0.85, 0.95, 0.0, 0.0
    for k in range(1, 200):
        average = b1 * average + (1 - b1) * c
        uncertain = b2 * uncertain + (1 - b2) * abs(c - average)
        assert average == pytest.approx(c * (1 - b1**k), rel=1e-12)
        closed = c * (1 - b2) * sum(b2 ** (k - j) * b1**j for j in range(1, k + 1))
        assert uncertain == pytest.approx(closed, rel=1e-10)
    assert uncertain < 1e-3 * c  # and goes to zero


@pytest.mark.parametrize("weak", [("site0", "A"), ("site3", "B"), ("site7", "B")])
def test_5_the_tensor_with_small_gradients_goes_first(weak: Key):
    base = {(f"site{k}", role): randn(2, 3, seed=k) for k in range(8) for role in "AB"}
    gradients = {key: (0.1 if key == weak else 1.0) * (g.sign() + 0.1 * g) for key, g in base.items()}
    shapes = dict.fromkeys(gradients, (2, 3))
    found = schedule_alone(lambda step: gradients, shapes, 400, 20, warmup_epochs=2, final_epochs=5, interval=10)
    assert found[weak] == min(found.values())
    assert sum(step == found[weak] for step in found.values()) == 1


def test_6_the_average_number_of_trained_numbers():
    options = {"total_steps": 40, "epochs": 20, "warmup_epochs": 2, "final_epochs": 10, "interval": 2}
    model, layers, handle, optimizer = begin(5, 7, 4, 6, lr=0.02, optimizer="adamw", **options)
    sizes = {(str(k), role): tensor.numel() for k in range(3) for role, tensor in factors(handle, str(k)).items()}
    counts, frozen_at = [], {}
    assert handle.trained_numbers == sum(sizes.values())
    for step in range(40):
        counts.append(handle.trained_numbers)  # of the step about to be done
        advance(model, handle, optimizer, step, 5, 6)
        for site, role in sizes:
            if not factors(handle, site)[role].requires_grad:
                frozen_at.setdefault((site, role), step + 1)
    integral = sum(size * frozen_at.get(key, 40) for key, size in sizes.items())
    assert sum(counts) == integral
    assert counts[0] == sum(3 * (m + n) + 3 + m for m, n in (W.shape for W, _ in layers))
    assert handle.trained_numbers == sum(3 + W.shape[0] for W, _ in layers) < integral / 40 < counts[0]


def test_export_is_plain_lora():
    x = randn(6, 5, seed=1)
    model, layers, handle, _ = begin(5, 7, total_steps=20, epochs=4, final_epochs=1)
    fill(handle)
    roles = factors(handle, "0")
    pair = handle.low_rank_of("0")
    assert pair is not None and pair.rank == 3
    close(pair.dense(), (roles["v"][:, None] * roles["B"] * roles["u"]) @ roles["A"], 1e-12)
    W, b = layers[0]
    close(model(x), x @ (W + delta(roles)).t() + b, 1e-12)
    put(roles["v"], 0.0)
    close(model(x), x @ W.t() + b, 1e-12)
