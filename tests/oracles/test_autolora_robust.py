"""AutoLoRa (robust) against its spec (arXiv:2310.01818): W + s B A sees natural inputs, W itself the attacked ones.

The oracles are the spec's list. With a radius of zero the attack returns its input, which makes whole losses comparable.
"""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise as rw
from rankwise.procedures.robust import RateController, attack
from tests.oracles.tools_training import drawn, normal, relative

N, HIDDEN, CLASSES, RANK = 6, 8, 4, 3
RADIUS, STEP = 8 / 255, 2 / 255
SITES = ["body"]


def network(seed: int = 0) -> nn.Sequential:
    parts = {"body": nn.Linear(N, HIDDEN), "norm": nn.BatchNorm1d(HIDDEN), "act": nn.Tanh(), "head": nn.Linear(HIDDEN, CLASSES)}
    model = nn.Sequential(OrderedDict(parts)).double()
    with torch.no_grad():
        for k, tensor in enumerate(model.parameters()):
            tensor.copy_(0.7 * normal(seed + k, *tensor.shape))
        model.norm.weight.add_(1.0)
        model.norm.running_mean.copy_(0.1 * normal(seed + 20, HIDDEN))
        model.norm.running_var.copy_(1.0 + normal(seed + 21, HIDDEN).abs())
    return model


def begin(*, branch: bool = True, seed: int = 0, **arguments):
    """(model, handle); with `branch`, B is away from zero."""
    model = network(seed)
    arguments = {"rank": RANK, "radius": 0.0, "attack_steps": 1, **arguments}
    handle = rw.adapt_(model, rw.catalog.autolora_robust(**arguments), where=SITES, train_also=["norm", "head"])
    if branch:
        B = handle.parameterization("body").roles()["B"]
        with torch.no_grad():
            B.copy_(0.5 * normal(30, *B.shape))
    return model, handle


def data(seed: int = 40, rows: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.rand(rows, N, generator=drawn(seed), dtype=torch.float64)
    return x, torch.randint(CLASSES, (rows,), generator=drawn(seed + 1))


def thread(handle: rw.Handle, name: str) -> None:
    for site in handle.targets:
        handle.parameterization(site).thread = name


class Twin:
    """The same network by hand: trained copies of all tensors, and z of either thread."""

    def __init__(self, model: nn.Module, handle: rw.Handle) -> None:
        roles = handle.parameterization("body").roles()
        named = {"W": roles["weight"], "A": roles["A"], "B": roles["B"]}
        named |= {"gain": model.norm.weight, "shift": model.norm.bias, "head": model.head.weight, "offset": model.head.bias}
        self.tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items()}
        self.live = named
        self.bias, self.norm = model.body.bias.detach(), model.norm

    def z(self, x: Tensor, natural: bool, training: bool) -> Tensor:
        t = self.tensors
        weight = t["W"].detach() + t["B"] @ t["A"] / RANK if natural else t["W"]
        gain, shift = (t["gain"].detach(), t["shift"].detach()) if natural else (t["gain"], t["shift"])
        mean, variance = (None, None) if training else (self.norm.running_mean.clone(), self.norm.running_var.clone())
        y = F.batch_norm(F.linear(x, weight, self.bias), mean, variance, gain, shift, training, 0.1, self.norm.eps)
        return F.linear(torch.tanh(y), t["head"], t["offset"])

    def loss(self, x: Tensor, y: Tensor, accuracy: float, scale: float, training: bool = True) -> Tensor:
        nat, adv = self.z(x, True, training), self.z(x, False, training)
        p, q = nat.log_softmax(1), adv.log_softmax(1)
        divergence = (p.exp() * (p - q)).sum(1).mean()  # KL(natural ‖ adversarial), with its graph on both sides
        return (1 - accuracy) * F.cross_entropy(nat, y) + accuracy * F.cross_entropy(adv, y) + scale * accuracy * divergence


def compare(twin: Twin, loss: Tensor) -> None:
    """The gradients of the twin's loss against those of the model."""
    expected = dict(zip(twin.tensors, torch.autograd.grad(loss, list(twin.tensors.values()), allow_unused=True), strict=True))
    for name, grad in expected.items():
        found = twin.live[name].grad
        if grad is None or not grad.any():
            assert found is None or not found.any(), name
        else:
            assert found is not None and relative(found, grad) < 1e-9, name


def test_1_at_the_start_both_threads_are_the_base() -> None:
    base, (model, handle), (x, _) = network(), begin(branch=False), data()
    base.eval(), model.eval()
    outputs = {}
    for name in ("natural", "adversarial"):
        thread(handle, name)
        outputs[name] = model(x)
        assert relative(outputs[name], base(x)) < 1e-12
    p, q = (z.log_softmax(1) for z in outputs.values())
    assert float((p.exp() * (p - q)).sum().abs()) < 1e-12


def test_1_what_the_threads_are() -> None:
    (model, handle), (x, _) = begin(), data()
    model.eval()
    twin = Twin(model, handle)
    for name in ("natural", "adversarial"):
        thread(handle, name)
        assert relative(model(x), twin.z(x, name == "natural", False)) < 1e-12
    assert relative(twin.z(x, True, False), twin.z(x, False, False)) > 1e-2


def test_1_start_of_the_branch() -> None:
    layer = nn.Linear(60, 50).double()
    handle = rw.adapt_(nn.Sequential(layer), rw.catalog.autolora_robust(rank=8))
    roles = handle.parameterization("0").roles()
    assert roles["weight"].shape == (50, 60) and roles["A"].shape == (8, 60) and roles["B"].shape == (50, 8)
    assert torch.equal(roles["weight"], layer.weight) and not roles["B"].any()
    assert abs(float(roles["A"].mean())) < 0.2 and abs(float(roles["A"].std()) - 1) < 0.15  # N(0, 1): 480 draws
    assert handle.parameterization("0").scale == 1 / 8


@pytest.mark.parametrize("training", [True, False])
def test_2_routing_of_the_natural_loss(training: bool) -> None:
    (model, handle), (x, y) = begin(), data()
    model.train(training)
    twin = Twin(model, handle)
    handle.procedure.natural_accuracy = 0.0
    handle.procedure.loss(model, x, y).backward()
    for name in ("W", "gain", "shift"):
        assert twin.live[name].grad is None or not twin.live[name].grad.any()
    for name in ("A", "B", "head", "offset"):
        assert twin.live[name].grad.any()
    compare(twin, F.cross_entropy(twin.z(x, True, training), y))


@pytest.mark.parametrize("training", [True, False])
def test_2_routing_of_the_adversarial_loss(training: bool) -> None:
    (model, handle), (x, y) = begin(scale=0.0), data()
    model.train(training)
    twin = Twin(model, handle)
    handle.procedure.natural_accuracy = 1.0
    handle.procedure.loss(model, x, y).backward()
    for name in ("A", "B"):
        assert twin.live[name].grad is None or not twin.live[name].grad.any()
    for name in ("W", "gain", "shift", "head", "offset"):
        assert twin.live[name].grad.any()
    compare(twin, F.cross_entropy(twin.z(x, False, training), y))


def test_2_routing_by_the_entry() -> None:
    """The thread alone decides between the weight and the branch."""
    (model, handle), (x, y) = begin(), data()
    roles = handle.parameterization("body").roles()
    for name, idle in (("natural", ["weight"]), ("adversarial", ["A", "B"])):
        thread(handle, name)
        for tensor in roles.values():
            tensor.grad = None
        F.cross_entropy(model(x), y).backward()
        for role, tensor in roles.items():
            assert (tensor.grad is None or not tensor.grad.any()) == (role in idle)


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("scale", [6.0, 2.5])
def test_3_the_loss_and_its_automatic_weights(accuracy: float, scale: float) -> None:
    (model, handle), (x, y) = begin(scale=scale), data()
    twin = Twin(model, handle)
    handle.procedure.natural_accuracy = accuracy
    loss = handle.procedure.loss(model, x, y)
    expected = twin.loss(x, y, accuracy, scale)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    loss.backward()
    compare(twin, expected)


def test_3_one_step_of_sgd() -> None:
    (model, handle), (x, y) = begin(), data()
    twin, lr = Twin(model, handle), 0.05
    optimizer = handle.optimizer(lr, weight_decay=0.0)
    handle.procedure.natural_accuracy = 0.4
    expected = twin.loss(x, y, 0.4, 6.0)
    grads = torch.autograd.grad(expected, list(twin.tensors.values()))
    loss = handle.backward(lambda: handle.procedure.loss(model, x, y))
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
    optimizer.step()
    handle.after_step()
    for (name, tensor), grad in zip(twin.tensors.items(), grads, strict=True):
        assert relative(twin.live[name], tensor - lr * grad) < 1e-9, name  # momentum starts with the gradient itself
        assert relative(twin.live[name], tensor) > 1e-6, name


def smooth() -> nn.Module:
    model = nn.Sequential(nn.Linear(N, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
    with torch.no_grad():
        for k, tensor in enumerate(model.parameters()):
            tensor.copy_(normal(50 + k, *tensor.shape))
    return model


def test_4_the_attack_stays_in_the_ball_and_hurts() -> None:
    model, (x, y) = smooth(), data(rows=300)
    x[0], x[1] = 0.0, 1.0
    before = x.clone()
    moved = attack(model, x, y, radius=RADIUS, step_size=STEP, steps=10, generator=drawn(3))
    assert torch.equal(x, before) and not moved.requires_grad
    assert float((moved - x).abs().max()) <= RADIUS + 1e-12
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
    with torch.no_grad():
        rise = F.cross_entropy(model(moved), y, reduction="none") - F.cross_entropy(model(x), y, reduction="none")
    assert float((rise >= 0).double().mean()) > 0.95
    assert float(rise.mean()) > 0.01
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in model.parameters())
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_4_against_a_linear_model_it_reaches_the_corner() -> None:
    """The sign of the gradient never changes there, so that ten steps of a quarter of the radius end at its corner."""
    layer, (x, _) = nn.Linear(N, 2).double(), data()
    y = torch.arange(len(x)) % 2
    slope = (1.0 - 2.0 * y.double())[:, None] * (layer.weight[1] - layer.weight[0]).detach().sign()  # uphill, (rows, N)
    corner = x + RADIUS * slope
    found = attack(layer, x, y, radius=RADIUS, step_size=STEP, steps=10, generator=drawn(3))
    assert float((found - corner.clamp(0, 1)).abs().max()) < 1e-12
    two = attack(layer, x, y, radius=RADIUS, step_size=STEP, steps=2, generator=drawn(3))
    inner = (x > 0.1) & (x < 0.9)
    left = (two - x - 2 * STEP * slope)[inner]
    assert 5e-4 < float(left.square().mean().sqrt()) < 2e-3  # where it started: 0.001 · N(0, 1) away
    again = attack(layer, x, y, radius=RADIUS, step_size=STEP, steps=2, generator=drawn(3))
    assert torch.equal(again, two)


def test_4_batch_norm_rests_during_the_attack() -> None:
    model, (x, y) = network(), data()
    model.train()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    twin = network().eval()
    found = attack(model, x, y, radius=RADIUS, step_size=STEP, steps=5, generator=drawn(3))
    expected = attack(twin, x, y, radius=RADIUS, step_size=STEP, steps=5, generator=drawn(3))
    assert torch.equal(found, expected)
    assert model.training and not twin.training
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_4_the_attack_goes_through_the_adversarial_thread() -> None:
    """With a radius the adversarial part of the loss is that of an attack on W, whatever the branch does."""
    values = []
    for size in (0.5, 5.0):
        (model, handle), (x, y) = begin(radius=RADIUS, attack_steps=10, scale=0.0), data()
        B = handle.parameterization("body").roles()["B"]
        with torch.no_grad():
            B.copy_(size * normal(30, *B.shape))
        model.eval()
        handle.procedure.natural_accuracy = 1.0
        values.append(float(handle.procedure.loss(model, x, y).detach()))
        twin = Twin(model, handle)
        assert values[-1] > float(F.cross_entropy(twin.z(x, False, False), y)) + 1e-3
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def run(controller: RateController, accuracies: list[float]) -> tuple[list[float], list[int]]:
    """The rate after every epoch, and the epochs at which the best weights are taken back."""
    rates, reloads = [], []
    for epoch, accuracy in enumerate(accuracies):
        rate, reload = controller.after_epoch(epoch, accuracy)
        rates.append(rate)
        if reload:
            reloads.append(epoch)
    return rates, reloads


CHECKPOINTS = [0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50]


def test_5_steady_progress_keeps_the_rate() -> None:
    rates, reloads = run(RateController(CHECKPOINTS, 0.1), [0.3 + 0.01 * epoch for epoch in range(51)])
    assert rates == [0.1] * 51 and not reloads


def test_5_standstill_halves_it_at_every_checkpoint() -> None:
    rates, reloads = run(RateController(CHECKPOINTS, 0.1), [0.5] * 51)
    assert reloads == CHECKPOINTS[1:]
    for epoch, rate in enumerate(rates):
        assert rate == pytest.approx(0.1 / 2 ** sum(c <= epoch for c in CHECKPOINTS[1:]), rel=1e-12)


def test_5_progress_without_a_new_best() -> None:
    """Four of five epochs improve on the one before and none on the best: only every second checkpoint may halve."""
    rates, reloads = run(RateController([0, 5, 10, 15, 20], 0.1), [0.5 + 0.01 * (epoch % 5) for epoch in range(21)])
    assert reloads == [10, 20]
    assert rates == pytest.approx([0.1] * 10 + [0.05] * 10 + [0.025], rel=1e-12)


def test_5_too_few_improvements_with_a_new_best() -> None:
    accuracies = [0.5 + 0.1 * (epoch // 10) + 0.01 * (epoch % 2) for epoch in range(41)]  # every second epoch, rising slowly
    assert run(RateController([0, 10, 20, 30, 40], 0.1), accuracies)[1] == [10, 20, 30, 40]
    assert run(RateController([0, 10, 20, 30, 40], 0.1, share=0.4), accuracies)[1] == []
    rates, _ = run(RateController([0, 10, 20, 30, 40], 0.1, divide=5.0), accuracies)
    assert rates[-1] == pytest.approx(0.1 / 5**4, rel=1e-12)


def test_6_the_branch_can_be_dropped() -> None:
    (model, handle), (x, _) = begin(), data()
    model.eval()
    p = handle.parameterization("body")
    with torch.no_grad():
        p.roles()["weight"].add_(0.3 * normal(31, HIDDEN, N))  # as if trained
    thread(handle, "adversarial")
    before = model(x).detach()
    kept = p.roles()["B"].detach().clone()
    with torch.no_grad():
        p.roles()["B"].zero_()
        p.roles()["A"].zero_()
    assert torch.equal(model(x), before)
    with torch.no_grad():
        p.roles()["B"].copy_(kept)
    change = handle.update_of("body").dense()  # what is deployed is W, not W + s B A
    assert relative(change + model.body.weight, p.roles()["weight"]) < 1e-12
    handle.merge_()
    assert relative(model(x), before) < 1e-12


def test_6_whatever_thread_a_loss_ends_with() -> None:
    (model, handle), (x, y) = begin(), data()
    handle.procedure.natural_accuracy = 0.4
    handle.procedure.loss(model, x, y).backward()
    weight = handle.parameterization("body").roles()["weight"]
    with torch.no_grad():
        weight.add_(0.3 * normal(31, HIDDEN, N))
    assert relative(handle.update_of("body").dense() + model.body.weight, weight) < 1e-12


@pytest.mark.parametrize("k", [1, 3])
def test_7_the_branch_of_a_convolution(k: int) -> None:
    """A (r k, in k) and B (out k, r k); their product in the shape of the kernel, which is plain B A for k = 1."""
    model = nn.Sequential(OrderedDict(layer=nn.Conv2d(3, 5, k, padding=k // 2).double()))
    handle = rw.adapt_(model, rw.catalog.autolora_robust(rank=RANK), where=["layer"])
    p = handle.parameterization("layer")
    roles = p.roles()
    assert roles["A"].shape == (RANK * k, 3 * k) and roles["B"].shape == (5 * k, RANK * k)
    with torch.no_grad():
        roles["B"].copy_(normal(60, *roles["B"].shape))
    product = roles["B"].detach() @ roles["A"].detach()
    kernel = torch.empty(5, 3, k, k, dtype=torch.float64)
    for o in range(5):
        for c in range(3):
            for i in range(k):
                for j in range(k):  # row by row, as loralib's view does
                    flat = ((o * 3 + c) * k + i) * k + j
                    kernel[o, c, i, j] = product[flat // (3 * k), flat % (3 * k)]
    if k == 1:
        assert torch.equal(kernel[:, :, 0, 0], product)
    x = normal(61, 2, 3, 6, 6)
    for name, whole in (("natural", model.layer.weight + kernel / RANK), ("adversarial", model.layer.weight)):
        thread(handle, name)
        assert relative(model(x), F.conv2d(x, whole, model.layer.bias, padding=k // 2)) < 1e-12
