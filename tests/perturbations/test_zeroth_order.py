"""Zeroth-order estimates: exact on quadratics, restored and replayed to the bit, two forwards and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.lab.sweep import prior
from rankwise.perturbations.zeroth_order import ZerothOrder, replay_
from tests.core.training import Regression, assert_same_bits, numbers, open_gates


def blocks(dtype: torch.dtype = torch.float64) -> dict[str, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0": {"A": (2, 6), "B": (5, 2)}, "1": {"A": (2, 5)}}
    return {
        site: {
            role: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for role, shape in roles.items()
        }
        for site, roles in shapes.items()
    }


def flat(named: dict[str, dict[str, Tensor]]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for block in named.values() for tensor in block.values()])


def gradients(made: dict[str, dict[str, nn.Parameter]]) -> Tensor:
    return torch.cat([tensor.grad.flatten() for block in made.values() for tensor in block.values()])


def quadratic(made: dict[str, dict[str, nn.Parameter]]) -> tuple[Callable[[], Tensor], Tensor]:
    """½ wᵀ H w + bᵀ w, and its gradient."""
    w = flat(made)
    generator = torch.Generator().manual_seed(1)
    H, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((len(w), len(w)), (len(w),)))
    H = H @ H.mT / len(w)

    def loss() -> Tensor:
        here = torch.cat([tensor.flatten() for block in made.values() for tensor in block.values()])
        return 0.5 * here @ H @ here + b @ here

    return loss, H @ w + b


def train(handle: rankwise.Handle, loss: Callable[[], Tensor], steps: int, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(float(handle.backward(loss)))
        optimizer.step()
        handle.after_step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("difference", ["central", "derivative"])
@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
@pytest.mark.parametrize("smoothing", [1e-3, 0.7])
def test_on_a_quadratic_the_slope_is_exact_for_every_width(difference: str, distribution: str, smoothing: float) -> None:
    made = blocks()
    loss, gradient = quadratic(made)
    part = ZerothOrder(smoothing=smoothing, difference=difference, distribution=distribution, directions=3)
    part.estimate(made, loss, learning_rate=0.1)
    expected = torch.zeros_like(gradient)
    assert [rate for *_, rate in part.log] == [0.1] * 3
    for seed, coefficient, _ in part.log:
        u = flat(part.direction(made, seed))
        assert 3 * coefficient == pytest.approx(float(gradient @ u), rel=1e-9, abs=1e-10)
        expected += float(gradient @ u) * u / 3
        if distribution == "sphere":
            assert float(u.square().sum()) == pytest.approx(len(u), rel=1e-6)
    torch.testing.assert_close(gradients(made), expected, rtol=1e-8, atol=1e-9)


def test_a_forward_difference_is_off_by_the_curvature_along_u() -> None:
    made = blocks()
    loss, gradient = quadratic(made)
    part = ZerothOrder(smoothing=0.5, difference="forward")
    assert torch.equal(part.estimate(made, loss, learning_rate=0.1), loss().detach())
    ((seed, coefficient, _),) = part.log
    u = flat(part.direction(made, seed))
    with torch.no_grad():
        curvature = 2 * (_shifted(made, u, loss) - loss() - gradient @ u)
    assert coefficient == pytest.approx(float(gradient @ u + 0.25 * curvature), rel=1e-9)


def _shifted(made: dict[str, dict[str, nn.Parameter]], u: Tensor, loss: Callable[[], Tensor]) -> Tensor:
    tensors = [tensor for block in made.values() for tensor in block.values()]
    parts = u.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.add_(part.view_as(tensor))
    value = loss()
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.sub_(part.view_as(tensor))
    return value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("failing", [False, True])
def test_the_tensors_come_back_to_the_bit_also_when_a_loss_fails(dtype: torch.dtype, failing: bool) -> None:
    made, calls = blocks(dtype), []
    before = {site: {role: t.detach().clone() for role, t in block.items()} for site, block in made.items()}

    def loss() -> Tensor:
        calls.append(flat(made).clone())
        if failing and len(calls) == 2:
            raise ValueError("no loss")
        return flat(made).float().sin().sum()

    part = ZerothOrder(smoothing=0.1)
    if failing:
        with pytest.raises(ValueError, match="no loss"):
            part.estimate(made, loss, learning_rate=0.1)
        assert not part.log
    else:
        part.estimate(made, loss, learning_rate=0.1)
    assert len(calls) == 2 and not torch.equal(*calls) and not torch.equal(calls[0], flat(before))
    assert torch.equal(flat(made), flat(before))


def test_a_direction_is_the_same_in_every_dtype_and_without_global_randomness() -> None:
    part = ZerothOrder()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    wide, narrow = part.direction(blocks(), 17), part.direction(blocks(torch.bfloat16), 17)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(flat(wide).to(torch.bfloat16), flat(narrow))
    assert not torch.equal(flat(wide), flat(part.direction(blocks(), 18)))
    assert torch.corrcoef(torch.stack([flat(part.direction(blocks(), k)) for k in (17, 18)]))[0, 1].abs() < 0.4
    assert not torch.equal(wide["0"]["A"].flatten()[:10], wide["1"]["A"].flatten())


class Attention(nn.Module):
    """A model with dropout, running statistics and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.norm(self.drop(self.out(y)).transpose(1, 2))


def attention() -> tuple[Attention, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention().double(), torch.randn(3, 5, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("text", "forwards"),
    [
        ("zeroth_order", 2),
        ("zeroth_order(directions=3)", 6),
        ("zeroth_order(directions=3, difference='forward')", 4),
        ("zeroth_order(difference='derivative')", 1),
    ],
)
def test_forwards_by_counter_and_nothing_for_backward(text: str, forwards: int) -> None:
    model, x = attention()
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2, dropout=0.5)", text))
    open_gates(handle)
    optimizer = handle.optimizer(lr=0.01)
    count, kept = [], []
    model.register_forward_hook(lambda module, inputs, y: count.append(y.requires_grad))
    running = model.norm.running_mean.clone()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        handle.backward(lambda: model(x).square().mean())
    assert count == [False] * forwards and not kept
    assert torch.equal(model.norm.running_mean, running) and model.training
    optimizer.step()
    handle.after_step()


def test_the_derivative_is_that_of_backward_through_attention_and_the_fused_layer() -> None:
    model, x = attention()
    handle = rankwise.adapt_(model, rankwise.compose("lora(rank=2) + zeroth_order(difference='derivative')"))
    open_gates(handle)
    handle.optimizer(lr=0.01)
    value = handle.backward(lambda: model(x).sin().mean())
    ((seed, coefficient, _),) = handle.perturbation.log
    u = flat(handle.perturbation.direction(handle.blocks(), seed))
    model.eval()
    expected = model(x).sin().mean()
    found = torch.autograd.grad(expected, [t for block in handle.blocks().values() for t in block.values()])
    assert coefficient == pytest.approx(float(torch.cat([part.flatten() for part in found]) @ u), rel=1e-10)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("text", ["zeroth_order", "zeroth_order(directions=3, distribution='sphere', difference='forward')"])
def test_the_log_replays_to_the_bit_head_included(text: str) -> None:
    def made() -> tuple[Regression, rankwise.Handle]:
        problem = Regression()
        return problem, rankwise.adapt_(problem.model, rankwise.compose("lora(rank=2)", text), ["0"], train_also=["2"])

    problem, handle = made()
    optimizer = handle.optimizer(lr=0.02)
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        train(handle, lambda step=step: problem.loss(problem.batches[step % 3]), 1, optimizer)
    other, again = made()
    replay_(again, handle.perturbation.log)
    assert_same_bits(dict(problem.model.state_dict()), dict(other.model.state_dict()))
    if "3" in text:
        with pytest.raises(TrainingError, match="holds 20 directions, and 3 make a step"):
            replay_(again, handle.perturbation.log[:20])


def test_a_replay_needs_the_recipe_of_the_run() -> None:
    for text in ("lora(rank=2)", "lora(rank=2) + zeroth_order + adamw", "lora(rank=2) + zeroth_order + sgd(momentum=0.9)"):
        with pytest.raises(TrainingError, match="plain SGD steps"):
            replay_(Regression().adapt(text), [])


def test_sgd_unless_another_step_is_named() -> None:
    for text, name in (
        ("lora + zeroth_order", "sgd"),
        ("zeroth_order", "sgd"),
        ("full + zo_rank", "sgd"),
        ("lora + zeroth_order + adamw", "adamw"),
        ("zeroth_order + adamw(weight_decay=0.1)", "adamw"),
        ("lora + sam", "adamw"),
    ):
        assert [step.name for step in rankwise.compose(text).step] == [name], text
    assert prior(rankwise.compose("lora + zeroth_order"), 1000) == prior(rankwise.compose("lora"), 1000)


@pytest.mark.parametrize("step", ["sgd", "sgd(momentum=0.9)", "adamw", "lora_plus(ratio=4)", "scaled_gd"])
def test_it_trains_under_any_step_and_resumes_to_the_bit(step: str) -> None:
    text = f"lora(rank=2) + zeroth_order(directions=8) + {step}"
    straight, first, second = Regression(), Regression(), Regression()

    def run(problem: Regression, handle: rankwise.Handle, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        return train(handle, lambda: problem.loss(problem.batches[0]), steps, optimizer)

    whole = straight.adapt(text)
    losses = run(straight, whole, whole.optimizer(lr=0.02), 30)
    assert losses[-1] < 0.97 * losses[0]
    handle = first.adapt(text)
    optimizer = handle.optimizer(lr=0.02)
    run(first, handle, optimizer, 11)
    state, moments = copy.deepcopy(handle.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = second.adapt(text)
    second.model.load_state_dict(first.model.state_dict())
    again.load_state_dict(state)
    optimizer = again.optimizer(lr=0.02)
    optimizer.load_state_dict(moments)
    run(second, again, optimizer, 19)
    assert_same_bits(numbers(whole), numbers(again))
    assert whole.perturbation.log == again.perturbation.log


def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_not_logged() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + zeroth_order")
    before = numbers(handle)
    handle.optimizer(lr=0.1)
    with pytest.raises(TrainingError, match="holds NaN or infinity"):
        handle.backward(lambda: problem.loss(problem.batches[0]) * float("nan"))
    assert_same_bits(before, numbers(handle))
    assert not handle.perturbation.log


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"smoothing": 0.0}, "smoothing > 0"),
        ({"directions": 0}, "directions >= 1"),
        ({"distribution": "cube"}, "gaussian, sphere"),
        ({"difference": "backward"}, "central, forward, derivative"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        ZerothOrder(**arguments)  # type: ignore[arg-type]


def test_what_acts_inside_backward_is_refused() -> None:
    with pytest.raises(RecipeError, match="rescales the rows of the gradient"):
        Regression().adapt("lora(rank=2) + allora + zeroth_order")
    with pytest.raises(RecipeError, match="both sam and zeroth_order"):
        rankwise.compose("sam + zeroth_order")
