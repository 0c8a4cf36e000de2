"""Oracles of RoseLoRA: LoRA whose rows of A and columns of B are pruned by smoothed importance after every step.

The specification leaves open whether the first step is t = 0 or t = 1, so both countings are simulated and one must fit.
"""

import itertools

import pytest
import torch
from torch import nn

import rankwise as rw
from tests.oracles.tools import close, fill, linear, put, randn

roselora = rw.catalog.roselora


def keep_rate(t, keep, begin, end):
    """tau_t."""
    if t < begin:
        return 1.0
    if t >= end:
        return keep
    return keep + (1 - keep) * (1 - (t - begin) / (end - begin)) ** 3


def sparsity(values):
    """The fraction of zeros along the last dimension."""
    return (values == 0).double().mean(-1)


def lower_bound(B, A):
    """max(0, 1 - r + Σ [sp(A_i) + sp(B_i) - sp(A_i) sp(B_i)])."""
    a, b = sparsity(A), sparsity(B.t())
    return max(0.0, 1 - A.shape[0] + float((a + b - a * b).sum()))


def begin_training(m, n, *, step="sgd", lr=0.05, **options):
    model = nn.Sequential(linear(m, n))
    handle = rw.adapt_(model, rw.compose(roselora(**options), getattr(rw.catalog, step)()))
    return model, handle, handle.optimizer(lr=lr)


def factors(handle):
    roles = handle.parameterization("0").roles()
    return roles["B"], roles["A"]


def one_step(model, handle, optimizer, batches):
    for x, y in batches:
        (model(x) - y).square().mean().backward()
    handle.after_backward()
    optimizer.step()
    handle.after_step()
    optimizer.zero_grad()


def data(m, n, tokens=12):
    return randn(tokens, n, seed=1), randn(tokens, m, seed=2)


def run(m, n, steps, batches=None, generic=False, **options):
    """(B, A) before training and after every step; `generic`: from a B that is not zero."""
    model, handle, optimizer = begin_training(m, n, **options)
    if generic:
        fill(handle, size=0.3)
    history = [tuple(tensor.detach().clone() for tensor in factors(handle))]
    for _ in range(steps):
        one_step(model, handle, optimizer, batches or [data(m, n)])
        history.append(tuple(tensor.detach().clone() for tensor in factors(handle)))
    return history


def pruned(values, importance, count):
    """Each row of `values`: what is strictly below the count-th smallest importance becomes zero; by sorting."""
    values = values.clone()
    if count < 1:
        return values
    for i in range(values.shape[0]):
        threshold = sorted(importance[i].tolist())[count - 1]
        for j in range(values.shape[1]):
            if float(importance[i, j]) < threshold:
                values[i, j] = 0.0
    return values


def simulated(start, batch, steps, *, first, alpha, lr, keep, begin, end, smoothing, clamp=None):
    """The algorithm with plain SGD; `first` is the t of the first step."""
    W, bias = (tensor.detach() for tensor in linear(start[0].shape[0], start[1].shape[1]).parameters())
    (B, A), (x, y), average, history = start, batch, {}, [start]
    s = alpha / A.shape[0]
    for step in range(steps):
        leaves = {"A": A.clone().requires_grad_(), "B": B.clone().requires_grad_()}
        loss = (x @ (W + s * leaves["B"] @ leaves["A"]).t() + bias - y).square().mean()
        gradients = dict(zip("AB", torch.autograd.grad(loss, [leaves["A"], leaves["B"]]), strict=True))
        for role, leaf in leaves.items():  # before the step
            importance = (leaf.detach() * gradients[role]).abs()
            average[role] = importance if step == 0 else smoothing * average[role] + (1 - smoothing) * importance
        A, B = A - lr * gradients["A"], B - lr * gradients["B"]
        tau = keep_rate(first + step, keep, begin, end)
        A = pruned(A, average["A"], int(A.shape[1] * (1 - tau)))
        B = pruned(B.t(), average["B"].t(), int(B.shape[0] * (1 - tau))).t()
        if clamp is not None:
            A, B = A.clamp(-clamp, clamp), B.clamp(-clamp, clamp)
        history.append((B, A))
    return history


def difference(one, other):
    """The largest difference of two trajectories."""
    return max(float((a - b).abs().max()) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("step", ["sgd", "adamw"])
def test_1_keeping_all_is_lora(step):
    mine = run(9, 10, 12, step=step, rank=3, alpha=3.0, keep=1.0, begin=1, end=4)
    model = nn.Sequential(linear(9, 10))
    handle = rw.adapt_(model, rw.compose(rw.catalog.lora(rank=3, alpha=3.0), getattr(rw.catalog, step)()))
    for tensor, value in zip(factors(handle), mine[0], strict=True):
        put(tensor, value)
    optimizer = handle.optimizer(lr=0.05)
    for B, A in mine[1:]:
        one_step(model, handle, optimizer, [data(9, 10)])
        close(B, factors(handle)[0].detach(), 1e-12)
        close(A, factors(handle)[1].detach(), 1e-12)
    assert mine[-1][0].abs().max() > 1e-2


@pytest.mark.parametrize("begin", [0, -1])
def test_1_pruning_from_the_first_step_is_refused(begin):
    # B = 0 there, so that all importances of B are zero
    with pytest.raises(rw.RankwiseError):
        begin_training(9, 10, rank=3, begin=begin, end=5)


SETTING = {"alpha": 3.0, "keep": 0.35, "begin": 2, "end": 7, "smoothing": 0.8}


@pytest.mark.parametrize("changed", [{}, {"smoothing": 0.0}, {"clamp": 0.1}, {"begin": 1, "end": 3, "keep": 0.15}])
@pytest.mark.parametrize("generic", [False, True])  # with B = 0 the first importances are zero, however they are weighted
def test_2_the_whole_algorithm(changed, generic):
    setting = {**SETTING, **changed}
    found = run(9, 10, 11, generic=generic, rank=3, lr=0.1, **setting)
    errors = [difference(found, simulated(found[0], data(9, 10), 11, first=t, lr=0.1, **setting)) for t in (0, 1)]
    assert min(errors) < 1e-12
    assert max(errors) > 1e-4  # so the test sees when and how much is pruned
    if "clamp" in changed:
        assert max(float(tensor.abs().max()) for tensor in found[-1]) == 0.1


@pytest.mark.parametrize("keep", [0.05, 0.35, 0.6])
def test_2_numbers_left_after_the_end(keep):
    m, n = 14, 25
    history = run(m, n, 12, step="adamw", rank=3, alpha=3.0, keep=keep, begin=2, end=6)
    for B, A in history[8:]:
        for tensor, size in ((A, n), (B.t(), m)):
            k = int(size * (1 - keep))
            assert (tensor != 0).sum(1).tolist() == [size - (k - 1)] * 3
    B, A = history[2]
    assert A.all() and B.all()  # nothing is pruned before the beginning


@pytest.mark.parametrize("smoothing", [0.3, 0.8])
def test_2_what_is_pruned_stays_pruned(smoothing):
    # A pruned entry is zero at the next backward, so its average shrinks by the factor beta, and no kept one shrinks faster:
    # their order never turns. Coming back is impossible with importances from before the step.
    history = run(9, 10, 40, step="adamw", rank=3, lr=0.2, alpha=3.0, keep=0.35, begin=2, end=7, smoothing=smoothing)
    for one, other in itertools.pairwise(history[2:]):
        for before, after in zip(one, other, strict=True):
            assert not after[before == 0].any()
    assert all((tensor == 0).any() for tensor in history[-1])


def test_2_ties_at_the_threshold_are_kept():
    # Inputs that are always zero have importance exactly zero: six of ten, at least as many as are pruned.
    x, y = data(9, 10)
    x = x * (torch.arange(10) < 4)
    history = run(9, 10, 10, [(x, y)], rank=3, alpha=3.0, keep=0.45, begin=2, end=6)
    B, A = history[-1]
    assert A.all()  # k = int(10 · 0.55) = 5: the fifth smallest is zero, and nothing is strictly below
    assert (B != 0).sum(0).tolist() == [9 - (int(9 * 0.55) - 1)] * 3


def test_2_micro_batches_count_once():
    x, y = data(9, 10)
    halves = [(x[:6], y[:6]), (x[6:], y[6:])]
    setting = {"rank": 3, **SETTING}
    model = run(9, 10, 9, halves, lr=0.1, **setting)
    whole = run(9, 10, 9, [(x, y)], lr=0.2, **setting)  # the halves' losses are summed: twice the gradient of the mean
    assert difference(model, whole) < 1e-10


def test_3_the_bound_on_random_factors():
    generator = torch.Generator().manual_seed(0)
    handle = rw.adapt_(nn.Sequential(linear(30, 40)), roselora(rank=4))
    tight = 0
    for _ in range(300):
        kept = 0.5 * torch.rand(2, generator=generator) ** 2
        A = randn(4, 40, seed=1) * (torch.rand(4, 40, generator=generator) < kept[0])
        B = randn(30, 4, seed=2) * (torch.rand(30, 4, generator=generator) < kept[1])
        for tensor, value in zip(factors(handle), (B, A), strict=True):
            put(tensor, value)
        found, bound = float(sparsity(handle.update_of("0").dense().flatten())), lower_bound(B, A)
        assert found >= bound - 1e-12
        tight += found - bound < 0.05
    assert tight > 20  # the bound is no triviality here


def test_3_disjoint_supports_reach_the_bound():
    handle = rw.adapt_(nn.Sequential(linear(12, 10)), roselora(rank=3))
    B, A = torch.zeros(12, 3, dtype=torch.float64), torch.zeros(3, 10, dtype=torch.float64)
    for i in range(3):
        B[4 * i : 4 * i + 2 + i % 2, i] = 1.0 + i
        A[i, 3 * i : 3 * i + 2] = 2.0
    for tensor, value in zip(factors(handle), (B, A), strict=True):
        put(tensor, value)
    assert float(sparsity(handle.update_of("0").dense().flatten())) == pytest.approx(lower_bound(B, A), abs=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_3_what_is_trained_obeys_the_bound(rank):
    m, n = 30, 40
    model, handle, optimizer = begin_training(m, n, step="adamw", rank=rank, alpha=float(rank), keep=0.1, begin=2, end=6)
    for _ in range(9):
        one_step(model, handle, optimizer, [data(m, n)])
    B, A = factors(handle)
    found = float(sparsity(handle.update_of("0").dense().flatten()))
    assert found >= lower_bound(B, A) - 1e-12
    k, q = int(n * 0.9) - 1, int(m * 0.9) - 1  # zeros in a row of A and in a column of B
    assert lower_bound(B, A) == pytest.approx(max(0.0, 1 - rank * (1 - k / n) * (1 - q / m)), abs=1e-12)


def test_4_with_rank_one_the_bound_is_exact():
    model, handle, optimizer = begin_training(30, 40, rank=1, alpha=1.0, keep=0.2, begin=2, end=6)
    for _ in range(9):
        one_step(model, handle, optimizer, [data(30, 40)])
        B, A = factors(handle)
        a, b = float(sparsity(A[0])), float(sparsity(B[:, 0]))
        assert float(sparsity(handle.update_of("0").dense().flatten())) == pytest.approx(a + b - a * b, abs=1e-12)
    assert a > 0.7 and b > 0.7


def test_5_the_schedule():
    keep, begin, end, m, n = 0.1, 2, 8, 50, 67
    assert keep_rate(begin, keep, begin, end) == 1
    assert keep_rate(5, keep, begin, end) == pytest.approx(keep + (1 - keep) / 8)
    assert keep_rate(end, keep, begin, end) == keep
    history = run(m, n, 12, step="adamw", rank=2, alpha=2.0, keep=keep, begin=begin, end=end)[1:]
    found = [((A != 0).sum(1).tolist(), (B != 0).sum(0).tolist()) for B, A in history]

    def expected(t):
        counts = [int(size * (1 - keep_rate(t, keep, begin, end))) for size in (n, m)]
        return tuple([size - max(count - 1, 0)] * 2 for size, count in zip((n, m), counts, strict=True))

    assert found in ([expected(t) for t in range(12)], [expected(t + 1) for t in range(12)])
    assert all(later <= sooner for (sooner, _), (later, _) in itertools.pairwise(found))


def test_6_a_planted_block_is_found():
    m = n = 24
    base = linear(m, n)
    x = randn(300, n, seed=1)
    planted = torch.zeros(m, n, dtype=torch.float64)
    planted[4:8, 10:14] = 2 * randn(4, 2, seed=3) @ randn(2, 4, seed=4)
    y = (base(x) + x @ planted.t() + 0.3 * randn(300, m, seed=5)).detach()
    results = []
    for recipe in (roselora(rank=2, alpha=2.0, keep=0.25, begin=20, end=100), rw.catalog.lora(rank=2, alpha=2.0)):
        model = nn.Sequential(linear(m, n))
        handle = rw.adapt_(model, rw.compose(recipe, rw.catalog.adamw()))
        optimizer = handle.optimizer(lr=0.03)
        for _ in range(250):
            one_step(model, handle, optimizer, [(x, y)])
        results.append((float((model(x) - y).square().mean()), handle.update_of("0").dense().detach()))
    (loss, update), (reference, plain) = results
    assert float(sparsity(update.flatten())) >= 0.8
    assert (update[4:8, 10:14] != 0).all() and update[4:8, 10:14].norm() > 0.9 * update.norm()
    assert plain.all()
    assert loss < 1.05 * reference
    assert reference < 0.1
