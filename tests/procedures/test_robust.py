"""Robust fine-tuning in two threads: the attack, the loss and its weights, the rate, and what a plain loop is told."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError, TrainingError
from rankwise.procedures.robust import AutoLoRaRobust, RateController, attack
from tests.core.training import assert_same_bits, numbers

CLASSES = 3


class Problem:
    """Small images in three classes, a convolution, a normalization layer, a linear layer and a head."""

    def __init__(self, text: str = "autolora_robust(rank=2, attack_steps=3)", *, head: bool = True, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [
                nn.Conv2d(2, 4, 3),
                nn.BatchNorm2d(4),
                nn.Flatten(),
                nn.Tanh(),
                nn.Linear(16, 8),
                nn.Tanh(),
                nn.Linear(8, CLASSES),
            ]
        self.model = nn.Sequential(*layers).double()
        self.y = torch.arange(48) % CLASSES
        # one channel tells the class loudly through much noise, the other quietly (an attack can undo it) and without any
        patterns = torch.randn(CLASSES, 2, 4, 4, generator=generator, dtype=torch.float64).sign()
        noise = torch.randn(48, 2, 4, 4, generator=generator, dtype=torch.float64)
        for channel, (signal, spread) in enumerate(((0.15, 0.12), (0.03, 0.003))):
            patterns[:, channel] *= signal
            noise[:, channel] *= spread
        self.x = (0.5 + patterns[self.y] + noise).clamp(0, 1)  # (48, 2, 4, 4)
        also = ["1", "6"] if head else []
        self.handle = rankwise.adapt_(self.model, rankwise.compose(text), where=["0", "4"], train_also=also, seed=seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = slice(12 * (step % 4), 12 * (step % 4) + 12)
        return self.x[rows], self.y[rows]

    def loss(self, step: int = 0) -> Tensor:
        return self.handle.procedure.loss(self.model, *self.batch(step))

    def on(self, thread: str) -> None:
        for site in self.handle.targets:
            self.handle.parameterization(site).thread = thread

    def train(self, optimizer: torch.optim.Optimizer, steps: int, *, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.handle.backward(lambda step=step: self.loss(step))
            optimizer.step()
            self.handle.after_step()
            optimizer.zero_grad()

    def accuracy(self, thread: str, **attacked: float) -> float:
        self.model.eval()
        self.on(thread)
        x = self.x
        if attacked:
            draw = torch.Generator().manual_seed(9)
            x = attack(self.model, x, self.y, step_size=2 / 255, steps=20, generator=draw, **attacked)
        right = (self.model(x).argmax(1) == self.y).double().mean()
        self.on("adversarial")
        self.model.train()
        return float(right)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_attack_stays_in_its_ball_and_raises_the_loss_of_almost_every_image() -> None:
    problem, radius = Problem(), 8 / 255
    x, y = problem.x, problem.y
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 0.0, 1.0
    problem.loss().backward()
    modes = [module.training for module in problem.model.modules()]
    before = {name: None if p.grad is None else p.grad.clone() for name, p in problem.model.named_parameters()}
    statistics = problem.model[1].running_mean.clone()
    x_adv = attack(problem.model, x, y, radius=radius, step_size=2 / 255, steps=10, generator=drawn())
    assert float((x_adv - x).abs().max()) <= radius + 1e-12
    assert float(x_adv.min()) >= 0.0
    assert float(x_adv.max()) <= 1.0
    assert not x_adv.requires_grad
    assert [module.training for module in problem.model.modules()] == modes
    assert torch.equal(problem.model[1].running_mean, statistics), "the attack runs in eval mode"
    for name, p in problem.model.named_parameters():
        assert (p.grad is None) == (before[name] is None)
        assert p.grad is None or torch.equal(p.grad, before[name])
    problem.model.eval()
    losses = [F.cross_entropy(problem.model(one), y, reduction="none") for one in (x, x_adv)]
    assert float((losses[1] >= losses[0]).double().mean()) > 0.95
    again = attack(problem.model, x, y, radius=radius, step_size=2 / 255, steps=10, generator=drawn())
    assert torch.equal(again, x_adv)


def test_the_attack_is_on_the_adversarial_thread_and_the_thread_comes_back() -> None:
    problem = Problem()
    options = {"radius": 0.05, "step_size": 0.01, "steps": 4}
    expected = attack(problem.model, problem.x, problem.y, generator=drawn(), **options)
    with torch.no_grad():
        for block in problem.handle.blocks().values():
            block["B"].fill_(0.5)
    problem.on("natural")
    assert torch.equal(attack(problem.model, problem.x, problem.y, generator=drawn(), **options), expected)
    assert problem.handle.parameterization("0").thread == "natural"


def parts(problem: Problem, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both cross entropies and KL(natural ‖ adversarial) by its definition."""
    problem.on("natural")
    natural = problem.model(x)
    problem.on("adversarial")
    adversarial = problem.model(x_adv)
    p, q = natural.softmax(1), adversarial.softmax(1)
    return F.cross_entropy(natural, y), F.cross_entropy(adversarial, y), (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 1.0])
def test_the_loss_and_its_weights(accuracy: float) -> None:
    problem = Problem("autolora_robust(rank=2, radius=0.0, scale=5.0)")
    problem.model.eval()
    with torch.no_grad():
        for block in problem.handle.blocks().values():
            block["B"].normal_(generator=drawn())
    x, y = problem.batch(0)
    natural, adversarial, divergence = parts(problem, x, x, y)  # with radius 0 the attack has nowhere to go
    assert float(divergence) > 1e-4
    problem.handle.procedure.natural_accuracy = accuracy
    expected = (1 - accuracy) * natural + accuracy * adversarial + 5.0 * accuracy * divergence
    torch.testing.assert_close(problem.loss(), expected, rtol=1e-12, atol=1e-12)
    first, second = problem.handle.procedure.lambdas(accuracy)
    assert first + accuracy == 1.0
    assert second == 5.0 * accuracy


def test_each_term_reaches_the_tensors_that_it_should() -> None:
    """S = 0 leaves the natural cross entropy alone; S = 1 the adversarial one and KL, whose natural side is not detached."""
    for accuracy, silent in ((0.0, {"0.weight", "4.weight", "1.weight", "1.bias"}), (1.0, set())):
        problem = Problem()
        with torch.no_grad():
            for block in problem.handle.blocks().values():
                block["B"].normal_(generator=drawn())
        problem.handle.procedure.natural_accuracy = accuracy
        problem.loss().backward()
        trained = {**problem.handle.blocks(), **problem.handle.plain_blocks()}
        moved = {f"{site}.{role}": t.grad for site, block in trained.items() for role, t in block.items()}
        assert {name for name, grad in moved.items() if grad is None or not grad.any()} == silent
        assert all(p.requires_grad for p in problem.model[1].parameters())


def test_at_the_start_both_threads_agree() -> None:
    problem = Problem()
    problem.model.eval()
    natural, adversarial, divergence = parts(problem, problem.x, problem.x, problem.y)
    assert abs(float(natural - adversarial)) < 1e-12
    assert abs(float(divergence)) < 1e-12


def test_the_accuracy_is_the_batch_s_own_then_the_window_s_or_what_was_measured() -> None:
    problem = Problem("autolora_robust(rank=2, attack_steps=1, update_every=3)")
    procedure, optimizer = problem.handle.procedure, problem.handle.optimizer(lr=0.05)
    right = []
    for step in range(3):
        x, y = problem.batch(step)
        problem.on("natural")
        with torch.no_grad():
            statistics = {name: b.clone() for name, b in problem.model[1].named_buffers()}
            right.append(float((problem.model(x).argmax(1) == y).double().mean()))
            for name, buffer in problem.model[1].named_buffers():
                buffer.copy_(statistics[name])
        problem.on("adversarial")
        assert procedure.natural_accuracy is None
        problem.train(optimizer, 1, first=step)
    assert procedure.natural_accuracy == pytest.approx(sum(right) / 3)
    measured = procedure.measure(problem.model, [problem.batch(0), problem.batch(1)])
    assert measured == procedure.natural_accuracy
    problem.model.eval()
    problem.on("natural")
    x, y = torch.cat([problem.batch(0)[0], problem.batch(1)[0]]), torch.cat([problem.batch(0)[1], problem.batch(1)[1]])
    assert measured == pytest.approx(float((problem.model(x).argmax(1) == y).double().mean()))
    with pytest.raises(ArgumentError, match="no batches"):
        procedure.measure(problem.model, [])


def test_training_makes_it_robust() -> None:
    """Against the same model trained on natural images alone, attacked within the radius."""
    robust, plain = Problem("autolora_robust(rank=2, radius=0.06, step_size=0.02, attack_steps=5)"), Problem("full + sgd")
    robust.train(robust.handle.optimizer(lr=0.05), 150)
    optimizer = plain.handle.optimizer(lr=0.05, momentum=0.9)
    for step in range(150):
        x, y = plain.batch(step)
        plain.handle.backward(lambda x=x, y=y: F.cross_entropy(plain.model(x), y))
        optimizer.step()
        plain.handle.after_step()
        optimizer.zero_grad()
    plain.model.eval()
    x_adv = attack(plain.model, plain.x, plain.y, radius=0.06, step_size=2 / 255, steps=20, generator=drawn(9))
    weak = float((plain.model(x_adv).argmax(1) == plain.y).double().mean())
    strong = robust.accuracy("adversarial", radius=0.06)
    print(f"attacked: {strong:.3f} robust, {weak:.3f} plain; natural: {robust.accuracy('adversarial'):.3f}")
    assert strong > weak + 0.1
    assert robust.accuracy("natural") > 0.8


def test_resumes_to_the_bit_through_a_file_with_sam_too() -> None:
    text = "autolora_robust(rank=2, attack_steps=2, update_every=3) + vasso(rho=0.05)"
    whole, first, second = Problem(text), Problem(text), Problem(text)
    whole.train(whole.handle.optimizer(lr=0.05), 8)
    optimizer = first.handle.optimizer(lr=0.05)
    first.train(optimizer, 5)
    file = io.BytesIO()
    kept = {"model": first.model.state_dict(), "handle": first.handle.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(kept, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second.model.load_state_dict(state["model"])
    second.handle.load_state_dict(state["handle"])
    going_on = second.handle.optimizer(lr=0.05)
    going_on.load_state_dict(state["optimizer"])
    second.train(going_on, 3, first=5)
    assert_same_bits(numbers(whole.handle), numbers(second.handle))


@pytest.mark.parametrize("through", ["handle.backward", "loss.backward", "nothing"])
def test_a_plain_loss_is_refused_and_told_the_way_out(through: str) -> None:
    problem = Problem()
    optimizer = problem.handle.optimizer(lr=0.05)
    problem.train(optimizer, 1)
    x, y = problem.batch(0)
    before = numbers(problem.handle)

    def plain() -> Tensor:
        return F.cross_entropy(problem.model(x), y)

    with pytest.raises(TrainingError, match=r"handle\.procedure\.loss\(model, x, y\)"):
        if through == "handle.backward":
            problem.handle.backward(plain)
        elif through == "loss.backward":
            plain().backward()
            problem.handle.after_backward()
        else:
            plain().backward()
            problem.handle.after_step()
    assert_same_bits(before, numbers(problem.handle))


def test_inputs_that_no_attack_can_move_are_refused() -> None:
    problem = Problem()
    x, y = problem.batch(0)
    for wrong in (x * 3, x - 0.5, (x * 255).long()):
        with pytest.raises(TrainingError, match=r"numbers in \[0, 1\].*normalize inside the model"):
            problem.handle.procedure.loss(problem.model, wrong, y)
    with pytest.raises(TrainingError, match="no layers with two threads"):
        problem.handle.procedure.loss(nn.Flatten(), x, y)


def test_a_head_that_wraps_its_logits() -> None:
    problem = Problem()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = problem.model

        def forward(self, x: Tensor) -> object:
            return type("Output", (), {"logits": self.inner(x)})()

    problem.model.eval()
    expected = problem.loss()
    torch.testing.assert_close(problem.handle.procedure.loss(Wrapped().eval(), *problem.batch(0)), expected)


def test_refused_compositions_and_arguments() -> None:
    with pytest.raises(RecipeError, match="both lora and autolora_robust"):
        rankwise.compose("lora + autolora_robust")
    for arguments in ({"step_size": 0.0}, {"radius": -1.0}, {"attack_steps": -1}, {"scale": -1.0}, {"update_every": 0}):
        with pytest.raises(ArgumentError, match="step_size > 0"):
            AutoLoRaRobust(**arguments)


@pytest.mark.parametrize("first", [0, 1])
def test_the_rate_never_falls_while_accuracy_rises_and_falls_at_every_checkpoint_while_it_stands(first: int) -> None:
    rising, standing = (RateController([0, 4, 8, 12], 0.1) for _ in range(2))
    seen = []
    for epoch in range(first, 13):
        assert rising.after_epoch(epoch, 0.01 * epoch) == (0.1, False)
        seen.append(standing.after_epoch(epoch, 0.5))
    assert [epoch for epoch, (_, again) in enumerate(seen, first) if again] == [4, 8, 12]
    assert seen[-1][0] == 0.1 / 8


def test_the_rate_falls_where_the_best_was_not_beaten_and_the_rate_not_changed() -> None:
    """Four of five epochs better than the one before, yet the best stays: the second condition alone."""
    controller = RateController([0, 5, 10, 15, 20], 1.0, divide=4.0)
    controller.after_epoch(0, 0.50)
    rates = {}
    sequence = [0.51, 0.52, 0.53, 0.54, 0.60]  # w₁: all better
    sequence += [0.30, 0.31, 0.32, 0.33, 0.34]  # w₂: four of five better, the best is still 0.60
    sequence += [0.30, 0.31, 0.32, 0.33, 0.34]  # w₃: the same, but the rate was changed at w₂
    sequence += [0.30, 0.31, 0.32, 0.33, 0.34]  # w₄: and now it was not
    for epoch, accuracy in enumerate(sequence, 1):
        rate, again = controller.after_epoch(epoch, accuracy)
        rates[epoch] = rate
        assert again == (epoch in (10, 20))
    assert (rates[5], rates[10], rates[15], rates[20]) == (1.0, 0.25, 0.25, 0.0625)
    assert controller.best == 0.60
    again = RateController([0, 5, 10, 15, 20], 1.0, divide=4.0)
    again.load_state_dict(controller.state_dict())
    assert again.state_dict() == controller.state_dict()
    for wrong in ([3], [0, 0, 1]):
        with pytest.raises(ArgumentError, match="rising"):
            RateController(wrong, 0.1)
    with pytest.raises(ArgumentError, match="divide > 1"):
        RateController([0, 1], 0.1, divide=1.0)
