"""Maestro: the penalty's gradient, cuts that resume, pruning with momentum, empty layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.procedures.maestro import Sampler, group_lasso, importance


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Begun:
    def __init__(self, text: str, lr: float = 0.01) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(16, 6)).double()
        self.x, self.y = drawn(20, 2, 4, 4), drawn(20, 6, seed=1)
        self.handle = rankwise.adapt_(self.net, rankwise.compose(text), ["0", "3"])
        self.optimizer = self.handle.optimizer(lr=lr)

    def run(self, count: int) -> list[dict[str, int | None]]:
        cuts = []
        for _ in range(count):
            cuts.append({site: self.handle.parameterization(site).prefix for site in ("0", "3")})
            self.handle.backward(lambda: (self.net(self.x) - self.y).square().mean())
            self.optimizer.step()
            self.handle.after_step()
            self.optimizer.zero_grad()
        return cuts


@pytest.mark.parametrize("hierarchical", [True, False])
def test_the_penalty_has_no_nan_at_zeros(hierarchical: bool) -> None:
    B, A = drawn(5, 4), drawn(4, 6, seed=1)
    B[:, 2:], A[3:] = 0.0, 0.0
    B.requires_grad_()
    A.requires_grad_()
    group_lasso(B, A, hierarchical).backward()
    assert torch.isfinite(B.grad).all() and torch.isfinite(A.grad).all()
    norms = [A[b:].norm() if hierarchical else A[b].norm() for b in range(3)]
    inverse = torch.stack([1 / norm for norm in norms]).detach()
    expected = A.detach()[:3] * (inverse.cumsum(0) if hierarchical else inverse)[:, None]
    torch.testing.assert_close(A.grad[:3], expected, rtol=1e-12, atol=1e-12)
    assert not A.grad[3:].any() and not B.grad[:, 2:].any()
    assert bool((importance(B, A).diff() <= 0).all()) and not importance(B, A)[2:].any()


def test_it_resumes_to_the_bit_after_a_pruning(tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = "maestro(interval=3, penalty=1e-2, threshold=1.0)"
    straight, first, second = Begun(text), Begun(text), Begun(text)
    cuts = straight.run(9)
    first.run(5)
    assert first.handle.parameterization("3").rank < 6
    first.handle.save(tmp_path / "a")
    second.handle.detach_()
    second.handle = rankwise.load_(second.net, tmp_path / "a")
    second.handle.load_state_dict(copy.deepcopy(first.handle.state_dict()))
    second.optimizer = second.handle.optimizer(lr=0.01)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert second.run(4) == cuts[5:]
    for site, block in straight.handle.blocks().items():
        for role, tensor in block.items():
            assert torch.equal(tensor, second.handle.blocks()[site][role]), (site, role)


def test_a_loaded_adapter_without_its_state_still_cuts_one_layer_at_a_time(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, second = Begun("maestro(penalty=0.0)"), Begun("maestro(penalty=0.0)")
    first.run(3)
    first.handle.save(tmp_path / "a")
    second.handle.detach_()
    second.handle = rankwise.load_(second.net, tmp_path / "a")
    second.optimizer = second.handle.optimizer(lr=0.01)
    for cut in second.run(6):
        assert sum(b is not None for b in cut.values()) == 1


def test_pruning_keeps_momentum_and_cuts_nothing_that_counts() -> None:
    begun = Begun("maestro(interval=4, penalty=0.0, threshold=1.0)")
    begun.run(3)
    B, r = begun.handle.blocks()["3"]["B"], begun.handle.parameterization("3").rank
    moments = begun.optimizer.state[B]
    kept = {}

    def remember(*_: object) -> None:
        kept.update({name: value.clone() for name, value in moments.items()})

    begun.optimizer.register_step_post_hook(remember)
    begun.run(1)
    entry = begun.handle.parameterization("3")
    assert 0 < entry.rank < r and bool((importance(entry.B, entry.A) > 0).all())
    for name, value in begun.optimizer.state[entry.B].items():
        assert torch.equal(value, kept[name][:, : entry.rank] if value.dim() else kept[name]), name
    begun.run(3)


def test_a_layer_without_directions_is_its_bias_and_training_goes_on() -> None:
    begun = Begun("maestro(interval=2, penalty=1e-3, threshold=1e6)")
    begun.run(4)
    assert [begun.handle.parameterization(site).rank for site in ("0", "3")] == [0, 0]
    torch.testing.assert_close(begun.net(begun.x), begun.net[3].bias.expand(20, 6))


def test_whole_outside_training_and_by_hand() -> None:
    begun = Begun("maestro")
    entry = begun.handle.parameterization("3")
    entry.prefix = 2
    begun.handle.parameterization("0").prefix = None
    h = begun.net[:3](begun.x)
    weight = entry.B[:, :2] @ entry.A[:2]
    torch.testing.assert_close(begun.net(begun.x), h @ weight.mT + begun.net[3].bias, rtol=1e-12, atol=1e-12)
    begun.net.eval()
    torch.testing.assert_close(entry.B @ entry.A, begun.net[3].weight, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="at least 0"):
        entry.prefix = -1


def test_the_sampler() -> None:
    first = Sampler({"a": 2, "b": 3, "none": 0}, "per_layer", 0)
    draws = [draw for draw, _ in zip(first, range(10), strict=False)]
    for half in (draws[:5], draws[5:]):
        assert sorted((site, b) for draw in half for site, b in draw.items()) == [
            ("a", 1),
            ("a", 2),
            ("b", 1),
            ("b", 2),
            ("b", 3),
        ]
    assert first.draw(7) == draws[7]
    across = Sampler({"a": 2, "b": 3}, "across_layers", 0)
    seen = {tuple(across.draw(k).values()) for k in range(200)}
    assert seen == {(a, b) for a in (1, 2) for b in (1, 2, 3)}
    assert Sampler({}, "per_layer").draw(3) == {}


@pytest.mark.parametrize("text", ["interval=0", "penalty=-1.0", "threshold=-1.0", "sampler='all'"])
def test_bad_arguments_are_refused_before_training(text: str) -> None:
    with pytest.raises(ArgumentError):
        Begun(f"maestro({text})")
