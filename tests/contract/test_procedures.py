"""The contract of every procedure in the catalog, generated from it: resuming, determinism, saving, descent."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise import catalog
from rankwise.core.checkpoint import load_

RATE, STEPS = 0.02, 7
TEXTS = [text for slug in catalog.names("procedure") for text in (catalog.entry(slug).small, *catalog.entry(slug).variants)]


class Training:
    """Two linear layers and a convolution under a procedure, on the mean of ‖y' - y‖²."""

    def __init__(self, text: str, *, seed: int = 0) -> None:
        self.recipe, self.seed = rankwise.compose(text), seed
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 6)
            )
        self.model = self.model.double()
        self.x = torch.randn(12, 2, 4, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        kinds = self.recipe.method.facts.layouts
        where = ["3", "5", "0"] if "conv" in kinds else ["3", "5"]
        found = rankwise.problems(self.model, self.recipe, where)
        where = [name for name in where if not any(name in problem.sites for problem in found)]
        self.handle = rankwise.adapt_(self.model, self.recipe, where, seed=seed)
        self.optimizer = self.handle.optimizer(lr=RATE)

    def loss(self) -> Tensor:
        own = getattr(self.handle.procedure, "loss", None)  # makes the loss itself, from inputs in [0, 1] and classes
        if own is not None:
            return own(self.model, self.x.sigmoid(), self.y.argmax(1))
        return (self.model(self.x) - self.y).square().mean()

    def run(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            losses.append(float(self.handle.backward(self.loss)))
            self.optimizer.step()
            self.handle.after_step()
            self.optimizer.zero_grad()
        return losses

    def tensors(self) -> dict[str, Tensor]:
        sites = self.handle.targets
        named = {f"{site}.{key}": t for site in sites for key, t in self.handle.parameterization(site).state_dict().items()}
        return {key: tensor.detach().clone() for key, tensor in named.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


@pytest.mark.parametrize("text", TEXTS)
def test_resumes_to_the_bit(text: str, tmp_path) -> None:
    """Saved in the middle, loaded onto a fresh base by a fresh handle, and trained on."""
    straight, first = Training(text), Training(text)
    straight.run(STEPS)
    first.run(4)
    first.handle.save(tmp_path / "a")
    state, optimizer = copy.deepcopy(first.handle.state_dict()), copy.deepcopy(first.optimizer.state_dict())
    second = Training(text)
    second.handle.detach_()
    second.handle = load_(second.model, tmp_path / "a")
    second.handle.load_state_dict(state)
    second.optimizer = second.handle.optimizer(lr=RATE)
    second.optimizer.load_state_dict(optimizer)
    second.run(STEPS - 4)
    assert_same(straight.tensors(), second.tensors())


# What these carry, and ranks cut while it trains, are made room for by `load_` (above) and by the Trainer's callback.
CARRYING = ("relora(", "rac_lora(", "cola(", "lte(rank=2, heads=2, alpha=4.0, interval=2, reset=True)")


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith(CARRYING)])
def test_a_second_handle_takes_the_state_up(text: str) -> None:
    """As a training loop resumes: the same adapter made again, its tensors and states filled."""
    straight, first, second = Training(text), Training(text), Training(text)
    straight.run(STEPS)
    first.run(4)
    for site in second.handle.targets:
        kept = first.handle.parameterization(site)
        second.handle.make_room(site, {key: tuple(tensor.shape) for key, tensor in kept.state_dict().items()})
        second.handle.parameterization(site).load_state_dict(kept.state_dict())
    second.handle.load_state_dict(copy.deepcopy(first.handle.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.run(STEPS - 4)
    assert_same(straight.tensors(), second.tensors())


@pytest.mark.parametrize("text", TEXTS)
def test_same_seed_same_result_and_no_global_randomness(text: str) -> None:
    torch.manual_seed(1)
    one = Training(text)
    before = torch.random.get_rng_state()
    one.run(STEPS)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    two = Training(text)
    two.run(STEPS)
    assert_same(one.tensors(), two.tensors())


@pytest.mark.parametrize("text", TEXTS)
def test_the_loss_falls(text: str) -> None:
    losses = Training(text).run(40)
    assert min(losses[-4:]) < 0.98 * losses[0]


@pytest.mark.parametrize("text", TEXTS)
def test_taking_it_off_restores_the_base(text: str) -> None:
    plain, trained = Training(text), Training(text)
    plain.handle.detach_()
    trained.run(STEPS)
    trained.handle.detach_()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, trained.model.state_dict()[name]), name


@pytest.mark.parametrize("text", TEXTS)
def test_a_saved_one_gives_the_same_outputs(text: str, tmp_path) -> None:
    trained = Training(text)
    trained.run(STEPS)
    trained.model.eval()
    expected = trained.model(trained.x)
    trained.handle.save(tmp_path / "a")
    trained.handle.detach_()
    load_(trained.model, tmp_path / "a")
    trained.model.eval()
    torch.testing.assert_close(trained.model(trained.x), expected, rtol=1e-9, atol=1e-9)
