"""The gradient projector, and GaLore on it."""

import pytest
import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.piece import piece
from rankwise.steps.galore import galore
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.projector import projected, side_of


def run(steps, W, gradients, lr=0.1):
    weight = torch.nn.Parameter(W.clone())
    optimizer = BlockOptimizer({"site": {"weight": weight}}, steps, lr)
    path = []
    for gradient in gradients:
        weight.grad = gradient(weight.detach()) if callable(gradient) else gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path, optimizer.state[weight]


def draws(m, n, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_sides():
    assert [side_of("std", *s) for s in ((3, 2), (2, 2), (2, 3))] == ["right", "right", "left"]
    assert [side_of("reverse_std", *s) for s in ((3, 2), (2, 2), (2, 3))] == ["left", "left", "right"]
    assert side_of("full", 3, 2) == "full"


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_full_rank_sgd_is_sgd(side):
    W, *gradients = draws(5, 5, 6)
    mine, _ = run([galore(rank=5, scale=1.0, refresh=2, side=side, inner=piece(sgd))], W, gradients)
    theirs, _ = run([sgd()], W, gradients)
    torch.testing.assert_close(mine[-1], theirs[-1])


@pytest.mark.parametrize(("shape", "side"), [((4, 7), "std"), ((7, 4), "std"), ((7, 4), "left"), ((6, 5), "full")])
def test_basis_is_orthonormal_takes_the_top_energy_and_holds_for_a_window(shape, side):
    W, *gradients = draws(*shape, 7)
    weight = torch.nn.Parameter(W.clone())
    optimizer = BlockOptimizer({"site": {"weight": weight}}, [galore(rank=2, refresh=3, side=side)], 0.1)
    bases = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[weight]
        bases.append({key: state[f"galore.{key}"].clone() for key in ("P", "Q") if f"galore.{key}" in state})
    assert {tuple(basis) for basis in bases} == {{"left": ("P",), "right": ("Q",), "full": ("P", "Q")}[side_of(side, *shape)]}
    for index, basis in enumerate(bases):
        for key, tensor in basis.items():
            same = index % 3 != 0 and torch.equal(tensor, bases[index - 1][key])
            assert same == (index % 3 != 0)  # refreshed at 0, 3, 6 and untouched to the bit between
            columns = tensor if key == "P" else tensor.mT
            torch.testing.assert_close(columns.mT @ columns, torch.eye(2, dtype=torch.float64))
            if index % 3 == 0:
                seen = columns.mT @ (gradients[index] if key == "P" else gradients[index].mT)
                top = torch.linalg.svdvals(gradients[index])[:2].square().sum()
                torch.testing.assert_close(seen.square().sum(), top)


def test_a_window_moves_the_weight_by_the_rank_only():
    W, *gradients = draws(6, 9, 9)
    path, _ = run([galore(rank=2, refresh=4)], W, gradients)
    ranks = [int(torch.linalg.matrix_rank(path[count] - W, atol=1e-10)) for count in (3, 7)]
    assert ranks == [2, 4]


def test_state_size_is_the_formula():
    for m, n, r, side, formula in (
        (6, 9, 2, "std", 6 * 2 + 2 * 9 * 2),
        (9, 6, 2, "std", 6 * 2 + 2 * 9 * 2),
        (9, 6, 2, "reverse_std", 9 * 2 + 2 * 6 * 2),
        (9, 6, 2, "full", 9 * 2 + 6 * 2 + 2 * 2 * 2),
    ):
        W, gradient = draws(m, n, 2)
        _, state = run([galore(rank=r, side=side)], W, [gradient])
        assert sum(value.numel() for value in state.values() if value.dim() > 0) == formula
        assert sum(value.dim() == 0 for value in state.values()) == 2


def test_transposed_problem_gives_transposed_weights():
    W, *gradients = draws(5, 8, 6)
    one, _ = run([galore(rank=2, refresh=2)], W, gradients)
    two, _ = run([galore(rank=2, refresh=2)], W.mT.contiguous(), [g.mT.contiguous() for g in gradients])
    torch.testing.assert_close(one[-1], two[-1].mT)


def test_weight_decay_acts_on_the_whole_weight():
    W, gradient = draws(5, 8, 2)
    (plain,), _ = run([galore(rank=2)], W, [gradient])
    (decayed,), _ = run([galore(rank=2, weight_decay=0.3)], W, [gradient])
    torch.testing.assert_close(decayed, plain - 0.1 * 0.3 * W)


def test_residual_limiter_and_transport_are_called_with_what_they_need():
    W, *gradients = draws(5, 8, 4)
    moved = []

    def outside(G, R, N, bases):
        return G - bases.up(R)

    def limit(residual, kept):
        kept["norm"] = torch.linalg.matrix_norm(residual)
        return residual

    def transport(kept, old, new):
        assert kept["inner.velocity"].shape == new.down(W).shape
        moved.append((old, new))

    path, state = run(
        [projected(name="p", inner=sgd(momentum=0.5), rank=2, scale=1.0, refresh=2, residual=outside, limiter=limit)],
        W,
        gradients[:1],
    )
    torch.testing.assert_close(path[0], W - 0.1 * gradients[0])  # inside + outside is the whole gradient
    assert float(state["p.norm"]) > 0
    run([projected(name="p", inner=sgd(momentum=0.5), rank=2, scale=1.0, refresh=2, transport=transport)], W, gradients)
    assert len(moved) == 1 and not torch.equal(moved[0][0].P, moved[0][1].P)


def test_plain_blocks_get_adamw_without_scale():
    head = {"bias": torch.nn.Parameter(torch.ones(3))}
    head["bias"].grad = torch.ones(3)
    BlockOptimizer({"head": head}, [galore(rank=2)], 0.1, plain=["head"]).step()
    torch.testing.assert_close(head["bias"].detach(), torch.full((3,), 0.9))


def test_bad_arguments():
    for make, text in (
        (lambda: galore(side="top"), "side is one of std"),
        (lambda: galore(rank=0), "rank >= 1"),
        (lambda: galore(inner=piece(adamw, weight_decay=0.1)), "give weight_decay to galore"),
        (lambda: galore(inner=piece(galore)), "inner is a step that makes the update"),
    ):
        with pytest.raises(ArgumentError, match=text):
            make()
    W, gradient = draws(3, 8, 2)
    with pytest.raises(ArgumentError, match=r"rank=4 is larger than a weight of 3 × 8"):
        run([galore(rank=4)], W, [gradient])
