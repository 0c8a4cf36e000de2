"""The template of sharpness-aware methods: preconditioners, averages, what resumes, what a resize forgets."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.decisions import Resize
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.perturbations.bounds import bounded_inverse
from rankwise.perturbations.sharpness import SharpnessAware, perturbation_of
from tests.core.training import Regression, assert_same_bits, numbers, open_gates
from tests.perturbations.test_sharpness import blocks, move

KINDS = [*itertools.product(("gradient", "average", "noise"), ("none", "weights", "fisher"))]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def stir(made, seed: int, scale: float = 1.0) -> None:
    """Fresh gradients."""
    generator = torch.Generator().manual_seed(seed)
    for block in made.values():
        for tensor in block.values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.grad = (noise * scale).to(tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_and_asam_are_the_plain_formula_to_the_bit(adaptive: bool, dtype: torch.dtype) -> None:
    made, again = blocks((7, 5), (33,), dtype=dtype), blocks((7, 5), (33,), dtype=dtype)
    SharpnessAware(rho=0.3, adaptive=adaptive).move(made, learning_rate=1.0)
    tensors = [block["A"] for block in again.values()]
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        sizes = [(t.grad * t.abs() if adaptive else t.grad).to(wide).square().sum() for t in tensors]
        factor = float(0.3 / (torch.stack(sizes).sum().sqrt() + 1e-12))
        for tensor in tensors:
            direction = tensor.grad * tensor.square() if adaptive else tensor.grad
            tensor.add_(direction.to(dtype), alpha=factor)
    for block, tensor in zip(made.values(), tensors, strict=True):
        assert torch.equal(block["A"], tensor)


def test_the_ball_of_each_preconditioner_is_filled_and_no_other_point_of_it_is_better() -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (8,))]

    g, w, C, D = drawn(), drawn(), [c.abs() + 0.1 for c in drawn()], [d.abs() + 0.1 for d in drawn()]
    for c, d in itertools.product((None, C), (None, D)):
        step = flat(perturbation_of(g, w, c, d, 0.7))
        ball = flat(d) if d is not None else torch.ones(20, dtype=torch.float64)
        value = flat(g) * (flat(c) if c is not None else 1.0)  # C g
        assert abs(float((step / ball).norm()) - 0.7) < 1e-10
        assert abs(float(value @ step) - 0.7 * float((ball * value).norm())) < 1e-10
        other = torch.randn(1000, 20, generator=generator, dtype=torch.float64)
        other = 0.7 * ball * other / other.norm(dim=1, keepdim=True)
        assert float((other @ value).max()) <= float(value @ step)
    doubled = flat(perturbation_of(g, w, [5 * c for c in C], D, 0.7))
    torch.testing.assert_close(doubled, flat(perturbation_of(g, w, C, D, 0.7)), rtol=1e-12, atol=1e-14)


def test_the_average_is_the_recursion_and_its_limits_are_sam_and_the_first_gradient() -> None:
    average: dict[str, Tensor] = {}
    made = {theta: blocks((3, 4), (5,)) for theta in (0.3, 1.0, 0.0, "sam")}
    parts = {t: SharpnessAware(rho=0.2, **({} if t == "sam" else {"direction": "average", "theta": t})) for t in made}
    first = None
    for step in range(4):
        moves = {}
        for theta, part in parts.items():
            stir(made[theta], 40 + step)
            moves[theta] = flat(move(part, made[theta]))
            part.restore(made[theta])
        for name, block in made[0.3].items():
            g = block["A"].grad
            average[name] = g if step == 0 else 0.7 * average[name] + 0.3 * g
        expected = flat(list(average.values()))
        torch.testing.assert_close(moves[0.3], 0.2 * expected / expected.norm(), rtol=1e-9, atol=1e-12)
        assert torch.equal(moves[1.0], moves["sam"])
        first = moves[0.0] if first is None else first
        torch.testing.assert_close(moves[0.0], first, rtol=1e-9, atol=1e-12)


def test_the_noise_is_measured_against_the_mean_before_and_its_bounds_hold() -> None:
    """C = (v̂ + δ mean)^(-p/2), v̂ and the mean corrected for their start, over both tensors together."""
    b, damping, made = 0.8, 0.05, blocks((3, 4), (5,))
    part = SharpnessAware(rho=0.2, direction="noise", smoothing=b, damping=damping, condition=1e9, power=1.5)
    m = v = torch.zeros(17, dtype=torch.float64)
    for step in range(4):
        stir(made, 50 + step)
        g = flat([block["A"].grad for block in made.values()])
        C = torch.ones(17, dtype=torch.float64)
        if step:
            v = b * v + (1 - b) * (g - m / (1 - b**step)).square()
            corrected = v / (1 - b**step)
            C = (corrected + damping * corrected.mean()) ** -0.75
        m = b * m + (1 - b) * g
        torch.testing.assert_close(flat(move(part, made)), 0.2 * C * g / (C * g).norm(), rtol=1e-9, atol=1e-12)
        part.restore(made)
    values = [torch.tensor([0.0, 1e-9, 1.0]), torch.tensor([[1e6, 3.0]])]
    inverse = bounded_inverse(values, values, power=2.0, damping=1e-3, condition=50.0, scale=False)
    assert inverse is not None
    everything = flat(inverse)
    assert abs(float(everything.max() / everything.min()) - 50.0) < 1e-3
    assert float(everything.argmin()) == 3


def test_equal_noise_no_power_and_no_noise_at_all_are_sam() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    mean = torch.tensor([3.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    parts = {
        "sam": SharpnessAware(rho=0.3),
        "equal": SharpnessAware(rho=0.3, direction="noise"),
        "power": SharpnessAware(rho=0.3, direction="noise", power=0.0),
    }
    noise = 0.0
    for step in range(6):
        noise = float(torch.randn((), generator=generator, dtype=torch.float64)) if step else 0.0
        moved = {}
        for name, part in parts.items():
            tensor = nn.Parameter(torch.ones(4, dtype=torch.float64))
            tensor.grad = mean + signs * noise  # the same size of noise in every entry
            moved[name] = move(part, {"0": {"A": tensor}})[0]
        torch.testing.assert_close(moved["equal"], moved["sam"], rtol=1e-9, atol=1e-12)
        assert torch.equal(moved["power"], moved["sam"])


def test_two_entries_of_very_different_noise() -> None:
    generator = torch.Generator().manual_seed(7)
    cosines = {}
    for direction in ("gradient", "noise"):
        part, found = SharpnessAware(rho=0.1, direction=direction), []
        for _ in range(2000):
            noise = torch.randn(2, generator=generator, dtype=torch.float64) * torch.tensor([0.01, 10.0])
            tensor = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            tensor.grad = 1.0 + noise
            found.append(float(move(part, {"0": {"A": tensor}})[0][0].abs() / 0.1))
        cosines[direction] = sum(found) / len(found)
    assert cosines["noise"] > 0.95
    assert cosines["gradient"] < 0.35


def test_fisher_metric_is_the_running_mean_square() -> None:
    b, made = 0.9, blocks((3, 4), (5,))
    part = SharpnessAware(rho=0.2, metric="fisher", damping=0.0, condition=1e12)
    F = torch.zeros(17, dtype=torch.float64)
    for step in range(3):
        stir(made, 60 + step)
        g = flat([block["A"].grad for block in made.values()])
        F = b * F + (1 - b) * g.square()
        D = (F / (1 - b ** (step + 1))) ** -0.5
        torch.testing.assert_close(flat(move(part, made)), 0.2 * D.square() * g / (D * g).norm(), rtol=1e-8, atol=1e-12)
        part.restore(made)


@pytest.mark.parametrize(("direction", "metric"), KINDS)
def test_resumes_to_the_bit_through_a_file(direction: str, metric: str) -> None:
    text = f"lora(rank=2, dropout=0.1) + presam(rho=0.3, direction='{direction}', metric='{metric}')"
    whole, part, resumed = Regression(), Regression(), Regression()
    handle = whole.adapt(text)
    whole.train(handle, handle.optimizer(lr=0.05), 7)
    first = part.adapt(text)
    optimizer = first.optimizer(lr=0.05)
    part.train(first, optimizer, 4)
    file = io.BytesIO()
    torch.save({"handle": first.state_dict(), "optimizer": optimizer.state_dict(), "tensors": numbers(first)}, file)
    part.train(first, optimizer, 1, first=4)  # what the first run does afterwards must not reach into the second
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = resumed.adapt(text)
    with torch.no_grad():
        for name, tensor in state["tensors"].items():
            site, role = name.rsplit(".", 1)
            second.blocks()[site][role].copy_(tensor)
    second.load_state_dict(state["handle"])
    going_on = second.optimizer(lr=0.05)
    going_on.load_state_dict(state["optimizer"])
    kept = state["handle"]["perturbation"]
    assert bool(kept) == (direction != "gradient" or metric == "fisher")
    assert not kept or kept["0.A"].keys() - {"steps"}
    resumed.train(second, going_on, 3, first=4)
    assert_same_bits(numbers(handle), numbers(second))


@pytest.mark.parametrize("direction", ["average", "noise"])
def test_a_tensor_that_is_cut_begins_its_average_again_and_the_others_go_on(direction: str) -> None:
    problem = Regression()
    handle = problem.adapt(f"gated_lora(rank=3) + presam(rho=0.1, direction='{direction}', metric='fisher') + sgd")
    open_gates(handle)
    optimizer = handle.optimizer(lr=0.01)
    problem.train(handle, optimizer, 3)
    handle.apply_({"0": Resize(torch.tensor([True, False, True]))})
    seen = {}
    run = problem.gradients([problem.batches[0]])

    def replay() -> None:
        seen.update({name: tensor.grad for name, tensor in before.items()})
        run()

    run()
    before = {f"{site}.{role}": tensor for site, block in handle.blocks().items() for role, tensor in block.items()}
    gradients = {name: tensor.grad.clone() for name, tensor in before.items()}
    handle.after_backward(replay)
    state = handle.perturbation.state_dict()
    for name, kept in state.items():
        cut = name in ("0.A", "0.B", "0.gate")
        assert kept["steps"] == (1 if cut else 4)
        assert all(value.shape == before[name].shape for key, value in kept.items() if key != "steps")
        if direction == "average":
            assert torch.equal(kept["average"], gradients[name]) == cut


def test_over_factors_leaves_the_other_tensors_and_the_head_alone() -> None:
    problem = Regression()
    recipe = rankwise.compose("dora(rank=2) + sam(rho=0.4, over='factors')")
    handle = rankwise.adapt_(problem.model, recipe, where=["0"], train_also=["2"])
    open_gates(handle)
    handle.optimizer(lr=0.1)
    trained = {name: tensor for name, tensor in problem.model.named_parameters() if tensor.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    moved: dict[str, Tensor] = {}

    def run() -> None:
        moved.update({name: tensor.detach() - before[name] for name, tensor in trained.items()})
        problem.loss(problem.batches[0]).backward()

    run()
    handle.after_backward(run)
    assert {name.rsplit(".", 1)[1] for name, step in moved.items() if step.any()} == {"A", "B"}
    assert len(trained) == 5
    assert abs(float(flat(list(moved.values())).norm()) - 0.4) < 1e-9


def test_gradients_that_overflowed_are_not_averaged() -> None:
    """Under a gradient scaler such a step is skipped; one infinity in an average would stay for good."""
    made, part = blocks((3, 4)), SharpnessAware(direction="noise", metric="fisher")
    part.move(made, learning_rate=1.0)
    part.restore(made)
    before = part.state_dict()
    made["0"]["A"].grad[0, 0] = float("inf")
    part.move(made, learning_rate=1.0)
    part.restore(made)
    after = part.state_dict()
    assert before["0.A"]["steps"] == after["0.A"]["steps"] == 1
    assert all(torch.equal(before["0.A"][key], after["0.A"][key]) for key in ("mean", "variance", "square"))


def test_half_precision_gradients_are_averaged_in_full() -> None:
    made, part = blocks((3, 4), dtype=torch.bfloat16), SharpnessAware(direction="average", metric="fisher", theta=0.5)
    part.move(made, learning_rate=1.0)
    assert {part.state_dict()["0.A"][key].dtype for key in ("average", "square")} == {torch.float32}


def test_refusals() -> None:
    for arguments, said in (
        ({"direction": "up"}, "direction is one of gradient, average, noise, not 'up'"),
        ({"metric": "hessian"}, "metric is one of none, weights, fisher"),
        ({"over": "weights"}, "over is one of all, factors"),
        ({"adaptive": True, "metric": "fisher"}, "choose one"),
        ({"direction": "average", "theta": 1.5}, r"theta lies in \[0, 1\]"),
        ({"theta": 0.5}, "theta=0.5 has no effect .* belongs to direction='average'"),
        ({"smoothing": 0.5}, "belongs to direction='noise' and metric='fisher'"),
        ({"direction": "noise", "damping": 0.0, "condition": float("inf")}, "bound one of them"),
    ):
        with pytest.raises(ArgumentError, match=said):
            SharpnessAware(**arguments)


def test_over_factors_is_refused_where_there_are_none() -> None:
    with pytest.raises(RecipeError, match="roles A, B; Full trains weight"):
        Regression().adapt("full + sam(over='factors')")
    with pytest.raises(RecipeError, match="roles A, B; LoRA trains B"):
        Regression().adapt("lora_fa(rank=2) + vasso(over='factors')")
    assert not rankwise.compose("full + sam").problems()
