"""Cuttlefish: which layers switch, when and to which ranks; optimizer, decay, files."""

import copy

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.procedures.cuttlefish import Watch, frobenius_gradient, stable_rank, target_rank


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Begun:
    def __init__(self, text: str, lr: float = 0.02) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        self.x, self.y = drawn(20, 9), drawn(20, 5, seed=1)
        self.handle = rankwise.adapt_(self.net, rankwise.compose(text), ["0", "2", "4"])
        self.optimizer = self.handle.optimizer(lr=lr)

    def run(self, count: int) -> None:
        for _ in range(count):
            self.handle.backward(lambda: (self.net(self.x) - self.y).square().mean())
            self.optimizer.step()
            self.handle.after_step()
            self.optimizer.zero_grad()


QUICK = "interval=1, window=2, threshold=100.0"


def test_only_the_named_layers_switch_and_the_optimizer_keeps_its_places() -> None:
    begun = Begun(f"cuttlefish({QUICK}, layers=('0', '4'))")
    begun.run(3)
    blocks = begun.handle.blocks()
    assert [sorted(block) for block in blocks.values()] == [["A", "B"], ["weight"], ["A", "B"]]
    (group,) = begun.optimizer.param_groups
    expected = [f"{site}.{role}" for site, block in blocks.items() for role in block]
    assert group["param_names"] == expected
    assert all(tensor is blocks[n.split(".")[0]][n.split(".")[1]] for n, tensor in zip(expected, group["params"], strict=True))
    assert set(begun.optimizer.state) == {blocks["2"]["weight"]}


def test_it_resumes_to_the_bit_with_some_layers_whole(tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = f"cuttlefish({QUICK}, layers=('0', '4'))"
    straight, first, second = Begun(text), Begun(text), Begun(text)
    straight.run(7)
    first.run(5)
    first.handle.save(tmp_path / "a")
    second.handle.detach_()
    second.handle = rankwise.load_(second.net, tmp_path / "a")
    second.handle.load_state_dict(copy.deepcopy(first.handle.state_dict()))
    second.optimizer = second.handle.optimizer(lr=0.02)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.run(2)
    for site, block in straight.handle.blocks().items():
        for role, tensor in block.items():
            assert torch.equal(tensor, second.handle.blocks()[site][role]), (site, role)


def test_the_switch_moves_the_weight_by_the_tail_alone() -> None:
    for rule in ("scaled", "plain"):
        begun = Begun(f"cuttlefish({QUICK}, rule={rule!r})", lr=0.0)
        start = begun.net[2].weight.detach().clone()
        begun.run(3)
        entry = begun.handle.parameterization("2")
        r = entry.rank
        assert r == (8 if rule == "scaled" else stable_rank(start))
        tail = torch.linalg.svdvals(start)[r:].square().sum().sqrt()
        torch.testing.assert_close((entry.B @ entry.A - start).norm(), tail, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entry.B.mT @ entry.B, entry.A @ entry.A.mT, rtol=1e-12, atol=1e-12)


def test_a_layer_at_rest_stays_at_rest_and_one_that_moves_never_rests() -> None:
    still, moving = Watch(3, 0.1), Watch(3, 0.1)
    assert [still.add(5) for _ in range(5)] == [False, False, False, True, True]
    assert still.add(50) and not any(moving.add(value) for value in range(40))


def test_ranks_are_whole_numbers_without_rounding() -> None:
    for d in (1, 3, 7, 29):
        assert stable_rank(torch.linalg.qr(drawn(d, d))[0] * 0.37) == d
        assert stable_rank(torch.linalg.qr(drawn(d, d).float())[0]) == d
    assert stable_rank(torch.zeros(3, 4)) == 0
    assert [target_rank(49, 7, sr) for sr in (7, 3, 1, 9, 0)] == [49, 21, 7, 49, 1]
    assert target_rank(49, 7, 3, "plain") == 3


def test_the_decay_is_added_after_the_switch_only() -> None:
    plain, decayed = Begun(f"cuttlefish({QUICK}, frobenius_decay=0.0)"), Begun(f"cuttlefish({QUICK}, frobenius_decay=0.5)")
    for begun in (plain, decayed):
        begun.run(3)
    B, A = (decayed.handle.blocks()["2"][role].detach().clone() for role in "BA")
    assert torch.equal(B, plain.handle.blocks()["2"]["B"])
    gradients = []
    for begun in (plain, decayed):
        begun.handle.backward(lambda begun=begun: (begun.net(begun.x) - begun.y).square().mean())
        gradients.append([begun.handle.blocks()["2"][role].grad for role in "BA"])
    for one, other, extra in zip(*gradients, frobenius_gradient(B, A, 0.5), strict=True):
        torch.testing.assert_close(other - one, extra, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("text", ["layers=('7',)", "interval=0", "window=0", "threshold=-0.1", "rule='other'"])
def test_bad_arguments_are_refused_before_training(text: str) -> None:
    with pytest.raises(ArgumentError):
        Begun(f"cuttlefish({text})")
