"""Moments in 8 bits: torchao's numbers, resumed to the bit, and inside a projector."""

import io

import pytest
import torch

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.piece import piece
from rankwise.steps import eight_bit
from rankwise.steps.coap import coap
from rankwise.steps.fira import fira
from rankwise.steps.galore import galore
from rankwise.steps.moments import adamw
from tests.steps.stepping import draws, run

pytest.importorskip("torchao")


def test_adamw_equals_torchao():
    from torchao.optim import AdamW8bit

    W, *gradients = draws(64, 72, 21, dtype=torch.float32)
    mine, state = run([adamw(bits=8)], W, gradients, lr=0.01)
    weight = torch.nn.Parameter(W.clone())
    theirs = AdamW8bit([weight], lr=0.01, weight_decay=0.0)
    with torch.compiler.set_stance("force_eager"):
        for gradient in gradients:
            weight.grad = gradient.clone()
            theirs.step()
    torch.testing.assert_close(mine[-1], weight.detach(), rtol=0, atol=2e-6)
    same = state["adamw.exp_avg_codes"] == theirs.state[weight]["exp_avg"].codes
    assert float(same.float().mean()) > 0.999  # but for numbers on the edge between two codes


def test_it_stays_near_adamw_in_single_precision():
    W, *gradients = draws(64, 65, 41, dtype=torch.float32)
    one, _ = run([adamw(bits=8)], W, gradients)
    two, _ = run([adamw()], W, gradients)
    assert 0.0 < float((one[-1] - two[-1]).norm() / (two[-1] - W).norm()) < 0.05


@pytest.mark.parametrize("shape", [(64, 64), (67, 71)])
def test_state_is_a_byte_per_number_and_small_tensors_stay_as_they_are(shape):
    W, gradient = draws(*shape, 2, dtype=torch.float32)
    _, state = run([adamw(bits=8)], W, [gradient])
    size, blocks = W.numel(), -(-W.numel() // 256)
    assert sum(value.nbytes for value in state.values() if value.dim()) == 2 * (size + 4 * blocks)
    assert state["adamw.exp_avg_codes"].shape == W.shape
    _, small = run([adamw(bits=8)], W[:10], [gradient[:10]])
    assert small["adamw.exp_avg"].dtype == torch.float32


def test_a_moment_is_read_as_it_was_written_up_to_its_code():
    for name, value in (("m", draws(70, 60, 1)[0].float()), ("m_sq", draws(70, 60, 1)[0].float().square())):
        kept = eight_bit.zeros(name, value)
        assert torch.equal(eight_bit.read(kept, name), torch.zeros_like(value))
        eight_bit.write(kept, name, value)
        back = eight_bit.read(kept, name)
        assert float((back - value).norm() / value.norm()) < 0.02


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamw(bits=8),
        lambda: galore(rank=48, refresh=3, inner=piece(adamw, bits=8)),
        lambda: fira(rank=48, refresh=3, inner=piece(adamw, bits=8)),
        lambda: coap(rank=48, refresh=2, recompute=2, restore=True, inner=piece(adamw, bits=8)),
    ],
)
def test_it_resumes_to_the_bit_through_a_file(make):
    W, *gradients = draws(64, 100, 8, dtype=torch.float32)

    def started(W, state=None):
        weight = torch.nn.Parameter(W.clone())
        optimizer = BlockOptimizer({"site": {"weight": weight}}, [make()], 0.01)
        if state is not None:
            optimizer.load_state_dict(state)
        return weight, optimizer

    def train(weight, optimizer, gradients):
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()

    weight, optimizer = started(W)
    train(weight, optimizer, gradients[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, other = started(weight.detach(), torch.load(file, weights_only=True))
    train(weight, optimizer, gradients[4:])
    train(again, other, gradients[4:])
    assert torch.equal(weight, again)
    assert any(value.dtype == torch.uint8 for value in optimizer.state[weight].values())
    exact, _ = run([make()], W, gradients, lr=0.01)
    assert torch.equal(exact[-1], weight.detach())


def test_its_scale_follows_a_tensor_that_is_multiplied():
    W, gradient = draws(64, 64, 2, dtype=torch.float32)
    step = adamw(bits=8)
    state = step.init({"A": W})
    step.update({"A": gradient}, state, {"A": W})
    before = eight_bit.read(state["A"], "exp_avg")
    step.rescaled(state["A"], torch.tensor(4.0))
    assert torch.equal(eight_bit.read(state["A"], "exp_avg"), before / 4.0)


def test_it_is_said_in_a_recipe():
    recipe = rankwise.compose("full + galore(rank=4, inner=adamw(bits=8))")
    assert recipe.step[0].arguments["inner"].arguments["bits"] == 8
    with pytest.raises(ArgumentError, match="bits=32 or bits=8, not 4"):
        adamw(bits=4)
