"""TRP: what is cut when, with which criterion, on which layers; beside steps other than the default."""

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.core.errors import ArgumentError, RecipeError
from rankwise.procedures.matricize import unfold
from rankwise.procedures.trp import truncate


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begin(text: str, where: object = "all-layers", lr: float = 0.05):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, (3, 2)), nn.Flatten(), nn.Tanh(), nn.Linear(60, 7)).double()
    handle = rankwise.adapt_(net, rankwise.compose(text), where)  # type: ignore[arg-type]
    x, y = drawn(8, 3, 6, 4), drawn(8, 7, seed=1)
    return net, handle, handle.optimizer(lr=lr), lambda: (net(x) - y).square().mean()


def step(begun) -> None:  # type: ignore[no-untyped-def]
    _, handle, optimizer, loss = begun
    handle.backward(loss)
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()


def ranks(handle: rankwise.Handle, kind: str = "channel") -> list[int]:
    kernel = handle.blocks()["0"]["weight"].detach().reshape(5, 3, 3, 2)
    return torch.atleast_1d(torch.linalg.matrix_rank(unfold(kernel, kind), rtol=1e-10)).tolist()


@pytest.mark.parametrize("kind", ["channel", "spatial", "filter"])
def test_weights_are_of_low_rank_after_every_interval_and_only_then(kind: str) -> None:
    begun = begin(f"trp(interval=3, fraction=0.5, matricization={kind!r})")
    full = {"channel": 5, "spatial": 9, "filter": 3}[kind]
    for count in range(7):
        step(begun)
        expected = -(-full // 2) if (count + 1) % 3 == 0 else full
        assert set(ranks(begun[1], kind)) == {expected}, count


def test_the_subgradient_acts_in_one_step() -> None:
    """With the loss's own gradient gone, W moves in the step after a cut by η λ U Vᵀ and then rests."""
    _, handle, optimizer, loss = begin("trp(interval=2, fraction=0.5, nuclear=0.1) + sgd", lr=0.5)
    weights = []
    for _ in range(4):
        handle.backward(lambda: loss() * 0.0)
        optimizer.step()
        weights.append(handle.blocks()["3"]["weight"].detach().clone())
        handle.after_step()
        optimizer.zero_grad()
    cut, direction, rank = truncate(weights[1], fraction=0.5)
    assert rank == 4 and torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[2], cut - 0.05 * direction, rtol=1e-12, atol=1e-12)
    assert torch.equal(weights[2], weights[3])


def test_the_criteria() -> None:
    M = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    assert [truncate(M, energy=e)[2] for e in (0.6, 16 / 25, 0.65, 24 / 25, 0.97, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert [truncate(M, threshold=t)[2] for t in (0.0, 1.0, 1.5, 4.0, 5.0)] == [4, 4, 3, 1, 0]
    assert [truncate(M, fraction=f)[2] for f in (0.1, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
    assert torch.equal(truncate(M, energy=1.0)[0], M)
    batch = torch.stack([M, torch.eye(4, dtype=torch.float64)])
    assert truncate(batch, threshold=1.5)[2].tolist() == [3, 0]


def test_half_precision_is_cut_in_single() -> None:
    M = drawn(12, 9).bfloat16()
    cut, _, rank = truncate(M, fraction=0.5)
    assert cut.dtype is torch.bfloat16 and rank == 5
    assert float(torch.linalg.svdvals(cut.float())[rank]) < 0.03 * float(torch.linalg.svdvals(M.float())[0])


@pytest.mark.parametrize("other", ["sgd(momentum=0.9)", "galore(rank=2, refresh=2)", "sam", "adamw(weight_decay=0.1)"])
def test_it_composes(other: str) -> None:
    begun = begin(f"trp(interval=3, fraction=0.5) + {other}", lr=0.01)
    losses = []
    for _ in range(6):
        with torch.no_grad():
            losses.append(float(begun[3]()))
        step(begun)
    assert ranks(begun[1]) == [3] and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "text",
    ["energy=0.0", "energy=1.1", "threshold=-1.0", "fraction=0.0", "interval=0", "nuclear=-1.0"],
)
def test_bad_arguments_are_refused_before_training(text: str) -> None:
    with pytest.raises(ArgumentError):
        begin(f"trp({text})")
    with pytest.raises(ArgumentError):
        begin("trp(threshold=0.1, fraction=0.5)")
    with pytest.raises(ArgumentError, match="matricization is one of"):
        begin("trp(matricization='rows')")


def test_another_parameterization_is_refused() -> None:
    with pytest.raises(RecipeError, match="both lora and trp"):
        rankwise.compose("lora + trp")
