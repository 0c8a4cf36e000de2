"""Count sketches, compressors and error feedback, alone and inside DistributedDataParallel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankwise.core.errors import ArgumentError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.steps.compressors import COMPRESSORS
from rankwise.steps.conef import communication_hook, conef
from rankwise.steps.count_sketch import CountSketch
from rankwise.steps.moments import sgd
from tests.steps.conef_worker import CASES, simulated

ROOT = Path(__file__).parents[2]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fed(step, gradients, role="weight"):
    """What a step makes of a sequence of gradients, and its last state."""
    block = {role: torch.zeros_like(gradients[0])}
    state = step.init(block)
    return [step.update({role: gradient}, state, block)[role].clone() for gradient in gradients], state[role]


def test_a_sketch_is_linear_and_has_bucket_sizes_as_eigenvalues():
    sketch = CountSketch(3, 20, 6, seed=4)
    V, U = normal(3, 20), normal(3, 20, seed=1)
    torch.testing.assert_close(sketch.sketch(2 * V - U), 2 * sketch.sketch(V) - sketch.sketch(U))
    there_and_back = sketch.query(sketch.sketch(torch.eye(20, dtype=torch.float64)))
    values = torch.linalg.eigvals(there_and_back).real.sort(descending=True).values
    torch.testing.assert_close(values[:6], sketch.sizes().double().sort(descending=True).values)
    assert float(values[6:].abs().max()) < 1e-12


def test_a_sketch_is_unbiased_over_its_seeds_and_not_contractive():
    v = normal(1, 30)
    seen = torch.stack([(s := CountSketch(1, 30, 8, seed)).query(s.sketch(v)) for seed in range(3000)])
    error = (seen - v).square().sum(-1).mean() / v.square().sum()
    assert float(error) == pytest.approx(29 / 8, rel=0.05)
    assert float((seen.mean(0) - v).abs().max()) < 5 * float(v.norm()) / (8 * 3000) ** 0.5


def test_wide_enough_sketches_lose_nothing_and_means_project():
    V = normal(4, 9)
    wide = CountSketch(4, 9, 9, seed=2)
    assert torch.equal(wide.query(wide.sketch(V)), V)
    means = CountSketch(1, 40, 8, seed=2, means=True)
    P = means.query(means.sketch(torch.eye(40, dtype=torch.float64)))
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P, P.mT)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_what_was_sent_and_what_is_kept_is_what_came(compressor, smoothing):
    gradients = [normal(6, 8, seed=seed) for seed in range(30)]
    sent, state = fed(conef(compressor=compressor, rank=2, smoothing=smoothing, memory="exact", start=0), gradients)
    torch.testing.assert_close(sum(sent), sum(gradients) - state["memory"], rtol=0.0, atol=1e-11)
    assert (float(state["memory"].abs().max()) < 1e-12) == (compressor == "none")


def test_a_sketch_as_wide_as_the_row_is_exact():
    gradients = [normal(3, 10, seed=seed) for seed in range(20)]
    one, _ = fed(conef(ratio=1.0, start=0), gradients)
    two, _ = fed(conef(memory="exact", start=0), gradients)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_powersgd_sends_its_rank_and_finds_the_subspace():
    G = normal(9, 2) @ normal(2, 7, seed=1)
    sent, state = fed(conef(compressor="powersgd", rank=2, start=0, memory="exact", smoothing=0.0), [G] * 4)
    torch.testing.assert_close(sent[0], G)  # of rank 2 and seen whole
    full = normal(9, 7, seed=2)
    sent, state = fed(conef(compressor="powersgd", rank=3, start=0), [full])
    assert torch.linalg.matrix_rank(sent[0]) == 3 and state["Q"].shape == (7, 3)


@pytest.mark.parametrize("shape", [(2, 1, 3), (5,)])
def test_other_shapes(shape):
    gradients = [normal(*shape, seed=seed) for seed in range(3)]
    sent, state = fed(conef(share=0.3, start=0), gradients)
    assert sent[-1].shape == shape
    assert (state == {}) == (len(shape) == 1)
    if len(shape) == 1:
        assert torch.equal(sent[-1], gradients[-1])


def test_plain_gradients_before_start_and_half_precision_keeps_single():
    gradients = [normal(4, 6, seed=seed).bfloat16() for seed in range(4)]
    sent, state = fed(conef(start=3), gradients)
    assert all(torch.equal(a, b) for a, b in zip(sent[:3], gradients, strict=False))
    assert int((sent[3] == 0).sum()) == 22 and state["memory"].dtype == torch.float32


def steps_to(memory, smoothing, seed):
    """Steps until ‖x‖ < 1e-3 on ½‖x‖², from ‖x‖ = 1, or 4000."""
    x = normal(1, 200, seed=seed)
    weight = torch.nn.Parameter(x / x.norm())
    steps = [conef(memory=memory, smoothing=smoothing, start=0, seed=seed), sgd()]
    optimizer = BlockOptimizer({"site": {"weight": weight}}, steps, 0.05)
    for count in range(1, 4001):
        weight.grad = weight.detach().clone()
        optimizer.step()
        if float(weight.detach().norm()) < 1e-3:
            return count
    return 4000


@pytest.mark.parametrize("seed", [0, 1])
def test_feedback_speeds_up_a_quadratic(seed):
    assert 130 <= steps_to("exact", 0.0, seed) <= 230
    assert 1200 <= steps_to("sketch", 0.9, seed) <= 1500


def test_two_workers_need_feedback():
    def run(feedback):
        x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
        step = conef(compressor="top", share=0.5, memory="exact", smoothing=0.0, start=0)
        states = [step.init({"x": x}) for _ in range(2)]
        for _ in range(4000):
            sent = []
            for state, shift in zip(states, (-10.0, 10.0), strict=True):
                if not feedback:
                    state["x"]["memory"].zero_()
                sent.append(step.update({"x": x + torch.tensor([[shift, 0.0]])}, state, {"x": x})["x"])
            x = x - 0.01 * (sent[0] + sent[1]) / 2
        return float(x[0, 1])

    assert run(False) == 1.0
    assert run(True) < 0.1


def test_bad_arguments():
    for make, text in (
        (lambda: conef(compressor="blocks"), "no compressor 'blocks'. Did you mean 'block'"),
        (lambda: conef(memory="dense"), "memory is one of sketch, exact, means"),
        (lambda: conef(share=0.0), r"share and ratio in \(0, 1\]"),
        (lambda: conef(rank=0), "rank >= 1"),
        (lambda: CountSketch(3, 0, 1), "columns and width >= 1"),
        (lambda: communication_hook(smoothing=1.0), r"smoothing in \[0, 1\)"),
    ):
        with pytest.raises(ArgumentError, match=text):
            make()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conef")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [sys.executable, "-m", "tests.steps.conef_worker", str(folder)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ddp_with_two_processes_is_two_workers_in_one(launched, case):
    one, two = (found[case] for found in launched)
    expected, sent = simulated(case, one["keys"])
    assert one["keys"] == two["keys"] and len(set(one["keys"].values())) == 4
    for name, tensor in expected.items():
        assert torch.equal(one["tensors"][name], two["tensors"][name])
        torch.testing.assert_close(one["tensors"][name], tensor, rtol=1e-10, atol=1e-12)
    assert one["sent"] == two["sent"] == sent
