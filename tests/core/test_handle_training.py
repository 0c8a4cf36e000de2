"""The order of calls around a step, the second pass, accumulation, and resuming in the middle of a run."""

from __future__ import annotations

import copy

import pytest
import torch

import rankwise
from rankwise.core.errors import TrainingError
from tests.core.training import Regression, assert_same_bits, numbers, open_gates

STATEFUL = [
    "lora(rank=2, dropout=0.3) + sam(rho=0.1)",
    "lora(rank=2) + bar(decay_steps=6)",
    "adalora(rank=3, target_rank=1, total_steps=8, warmup_steps=1, final_steps=2)",
    "sora(rank=3, threshold=(0.001, 0.01), rung_steps=2)",
    "lora(rank=2, dropout=0.2) + relora(interval=3)",
    "adalora(rank=3, target_rank=1, total_steps=8) + sam(rho=0.05)",
    "relora(rank=2, interval=3, moments=0.5) + sam(rho=0.05, adaptive=True)",
]


def test_forgotten_after_backward_is_an_error() -> None:
    for text in ("lora(rank=2) + bar", "sora(rank=2)", "lora(rank=2) + sam"):
        problem = Regression()
        handle = problem.adapt(text)
        optimizer = handle.optimizer(lr=0.01)
        problem.loss(problem.batches[0]).backward()
        with pytest.raises(TrainingError, match=r"between backward and step; call handle\.after_backward"):
            optimizer.step()


def test_forgotten_after_step_is_an_error_before_the_next_step() -> None:
    for text in ("lora(rank=2) + bar", "sora(rank=2)", "relora(rank=2, interval=2)"):
        problem = Regression()
        handle = problem.adapt(text)
        optimizer = handle.optimizer(lr=0.01)
        with pytest.raises(TrainingError, match=r"handle\.after_step\(\) was not called after the last one"):
            for _ in range(2):
                problem.loss(problem.batches[0]).backward()
                handle.after_backward()
                optimizer.step()
                optimizer.zero_grad()


def test_plain_lora_needs_neither_call() -> None:
    problem = Regression()
    optimizer = problem.adapt("lora(rank=2)").optimizer(lr=0.01)
    for _ in range(3):
        problem.loss(problem.batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_after_backward_per_micro_batch_is_an_error_and_a_skipped_step_is_not() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + bar")
    handle.optimizer(lr=0.01)
    problem.loss(problem.batches[0]).backward()
    handle.after_backward()
    handle.model.zero_grad()  # as under a gradient scaler that skipped the step
    problem.loss(problem.batches[1]).backward()
    handle.after_backward()
    problem.loss(problem.batches[2]).backward()
    with pytest.raises(TrainingError, match="twice on the same gradients"):
        handle.after_backward()


def test_nan_gradients_are_named() -> None:
    problem = Regression()
    handle = rankwise.adapt_(problem.model, rankwise.compose("lora(rank=2) + bar"), where=["0"], train_also=["2"])
    handle.optimizer(lr=0.01)
    x, y = problem.batches[0]
    problem.loss((x, y * float("nan"))).backward()
    with pytest.raises(TrainingError, match=r"step 0: the gradient of 0\.\w+ holds NaN"):
        handle.after_backward()
    problem.model.zero_grad()
    problem.loss((x, y)).backward()
    problem.model[2].bias.grad[1] = float("inf")
    with pytest.raises(TrainingError, match=r"the gradient of 2\.bias holds NaN or infinity"):
        handle.after_backward()


def test_a_nan_in_the_second_pass_is_found_and_the_weights_are_whole() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + sam")
    handle.optimizer(lr=0.01)
    before = numbers(handle)
    x, y = problem.batches[0]
    problem.loss((x, y)).backward()
    with pytest.raises(TrainingError, match="NaN"):
        handle.after_backward(lambda: problem.loss((x, y * float("nan"))).backward())
    assert_same_bits(before, numbers(handle))


def test_sam_without_replay_or_with_an_empty_one() -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + sam")
    handle.optimizer(lr=0.01)
    before = numbers(handle)
    problem.loss(problem.batches[0]).backward()
    with pytest.raises(TrainingError, match="a second time; pass a function"):
        handle.after_backward()
    with pytest.raises(TrainingError, match="gave no gradient"):
        handle.after_backward(lambda: problem.loss(problem.batches[0]))
    problem.model.zero_grad()
    problem.loss(problem.batches[0]).backward()
    with pytest.raises(ZeroDivisionError):
        handle.after_backward(lambda: 1 / 0)
    assert_same_bits(before, numbers(handle))


def test_both_passes_meet_the_same_masks_in_every_micro_batch() -> None:
    """With ρ = 0 the second gradient is the first one, to the bit, although dropout is on and batches are accumulated."""
    problem = Regression()
    handle = problem.adapt("lora(rank=2, dropout=0.5) + sam(rho=0.0)")
    open_gates(handle)
    handle.optimizer(lr=0.01)
    problem.model.eval()
    with torch.no_grad():
        problem.loss(problem.batches[0])  # an evaluation between steps does not count
    problem.model.train()
    run = problem.gradients(problem.batches)
    run()
    first = {name: tensor.grad.clone() for name, tensor in problem.model.named_parameters() if tensor.grad is not None}
    handle.after_backward(run)
    assert len(first) == 4
    assert_same_bits(first, {name: problem.model.get_parameter(name).grad for name in first})
    forwards = handle.masks.forwards
    problem.model.zero_grad()
    run()
    assert handle.masks.forwards == forwards + 3
    changed = [not torch.equal(value, problem.model.get_parameter(name).grad) for name, value in first.items()]
    assert all(changed), "the next step drew the same masks again"


@pytest.mark.parametrize("count", [1, 3])
def test_a_replay_of_other_micro_batches_is_an_error(count: int) -> None:
    problem = Regression()
    handle = problem.adapt("lora(rank=2) + sam")
    handle.optimizer(lr=0.01)
    problem.gradients(problem.batches[:2])()
    with pytest.raises(TrainingError, match="1 of the step's 2 forwards" if count == 1 else "more forwards than the step did"):
        handle.after_backward(problem.gradients(problem.batches[:count]))


def test_accumulated_micro_batches_equal_one_batch() -> None:
    results = []
    for split in (False, True):
        problem = Regression()
        handle = problem.adapt("lora(rank=2) + sam(rho=0.1)")
        optimizer = handle.optimizer(lr=0.01)
        batches = problem.batches if split else [tuple(map(torch.cat, zip(*problem.batches, strict=True)))]
        for _ in range(4):
            run = problem.gradients(batches)
            run()
            handle.after_backward(run)
            optimizer.step()
            handle.after_step()
            optimizer.zero_grad()
        results.append(numbers(handle))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-12)


def test_running_statistics_see_the_batch_once() -> None:
    problem = Regression(norm=True)
    handle = problem.adapt("lora(rank=2) + sam(rho=0.5)")
    handle.optimizer(lr=0.01)
    run = problem.gradients(problem.batches[:1])
    run()
    norm = problem.model[1]
    mean, count = norm.running_mean.clone(), norm.num_batches_tracked.item()
    handle.after_backward(run)
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked.item() == count == 1


def test_the_regularizer_of_a_schedule_is_in_both_passes_of_sam() -> None:
    """Without the batch's gradient in the replay, what is left in .grad is the regularizer's at the moved point."""
    problem = Regression()
    handle = problem.adapt("adalora(rank=3, target_rank=1, total_steps=8, orthogonality=0.5) + sam(rho=0.1)")
    open_gates(handle)
    handle.optimizer(lr=0.01)
    run = problem.gradients(problem.batches[:1])
    run()
    handle.after_backward(run)
    combined = {name: tensor.grad.clone() for name, tensor in problem.model.named_parameters() if tensor.grad is not None}

    def total():
        gram = 0.0
        for site in handle.targets:
            roles = handle.parameterization(site).roles()
            A, B = roles["A"], roles["B"]
            eye = torch.eye(3, dtype=torch.float64)
            gram = gram + torch.linalg.matrix_norm(A @ A.t() - eye) + torch.linalg.matrix_norm(B.t() @ B - eye)
        return problem.loss(problem.batches[0]) + 0.5 / 4 * gram

    parameters = {name: tensor for name, tensor in problem.model.named_parameters() if tensor.requires_grad}
    gradients = torch.autograd.grad(total(), list(parameters.values()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for tensor, gradient in zip(parameters.values(), gradients, strict=True):
            tensor.add_(gradient, alpha=float(0.1 / norm))
    for name, expected in zip(parameters, torch.autograd.grad(total(), list(parameters.values())), strict=True):
        torch.testing.assert_close(combined[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("text", STATEFUL)
def test_resuming_in_the_middle_continues_to_the_bit(text: str, tmp_path) -> None:
    whole = Regression()
    handle = whole.adapt(text)
    optimizer = handle.optimizer(lr=0.05)
    whole.train(handle, optimizer, 4)
    handle.save(tmp_path)
    kept = copy.deepcopy((handle.state_dict(), optimizer.state_dict()))
    whole.train(handle, optimizer, 5, first=4)

    resumed = Regression()
    again = rankwise.load_(resumed.model, tmp_path)
    other = again.optimizer(lr=0.05)
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    resumed.train(again, other, 5, first=4)
    assert again.step_count == 9
    assert_same_bits(numbers(handle), numbers(again))
    for site in handle.targets:
        torch.testing.assert_close(handle.update_of(site).dense(), again.update_of(site).dense(), rtol=0, atol=0)


def test_a_state_dict_survives_torch_save_without_pickled_code(tmp_path) -> None:
    problem = Regression()
    handle = problem.adapt(STATEFUL[2])
    problem.train(handle, handle.optimizer(lr=0.05), 7)
    torch.save(handle.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["schedule"]["kept"] == handle.schedule.kept == 2


def test_training_does_not_touch_the_global_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    for text in STATEFUL:
        problem = Regression()
        state = torch.get_rng_state()
        handle = problem.adapt(text)
        problem.train(handle, handle.optimizer(lr=0.05), 4)
        assert torch.equal(torch.get_rng_state(), state), text
    assert expected.numel()


@pytest.mark.parametrize("measured", ["nothing", "eval", "no_grad"])
def test_forwards_that_give_no_gradient_may_run_in_a_step_that_is_replayed(measured: str) -> None:
    """An attack or a measurement in the closure: with radius 0 the replay gives the first gradient, masks and all."""
    problem = Regression()
    handle = problem.adapt("lora(rank=2, dropout=0.3) + sam(rho=0.0)")
    open_gates(handle)
    handle.optimizer(lr=0.05)
    gradients: list[dict[str, torch.Tensor]] = []

    def run() -> None:
        if measured == "eval":
            problem.model.eval()
            problem.loss(problem.batches[0])
            problem.model.train()
        elif measured == "no_grad":
            with torch.no_grad():
                problem.loss(problem.batches[0])
        problem.loss(problem.batches[1]).backward()
        blocks = handle.blocks().items()
        gradients.append({f"{site}.{role}": tensor.grad.clone() for site, block in blocks for role, tensor in block.items()})

    run()
    handle.after_backward(run)
    assert_same_bits(*gradients)
