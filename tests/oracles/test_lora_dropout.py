"""Oracles of adapter dropout on LoRA: what is masked (input, rank, row, output, module), by how much, who shares, replay.

Masks are read off the outputs: every kind multiplies something by a gain that is 0 or 1/k, k = 1 - p. Saved bytes are counted
with hooks on what autograd keeps. Times are left to the benchmarks, blocks to OFT and BOFT.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from tests.oracles.tools import DOUBLE, adapted, backward, close, fill, grad, linear, put, randn

lora_dropout = rw.catalog.lora_dropout
KINDS = ["input", "rank", "row", "output", "module"]
M, N, R, ALPHA = 6, 5, 5, 7.5  # r = n, so that the input's mask can be read off the output; s = 1.5
SCALE = ALPHA / R


def generic(kind, *, probability=0.5, rank=R, seed=0, **options):
    """(model in training mode, handle, B, A, W, bias) at a generic point."""
    layer = linear(M, N)
    W, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    recipe = lora_dropout(rank=rank, alpha=SCALE * rank, kind=kind, probability=probability, **options)
    model, handle, p = adapted(recipe, layer, seed=seed)
    fill(handle)
    return model.train(), handle, p.roles()["B"], p.roles()["A"], W, bias


def gains(kind, y, x, B, A, W, bias):
    """What the mask multiplied: of inputs (…, n), of ranks (…, r), else of outputs (…, m)."""
    branch = (y - F.linear(x, W, bias)).detach()
    B, A = B.detach(), A.detach()
    if kind == "input":
        return branch @ torch.linalg.pinv(SCALE * B @ A).t() / x.detach()
    if kind == "rank":
        return branch @ torch.linalg.pinv(SCALE * B).t() / F.linear(x.detach(), A)
    return branch / (SCALE * F.linear(x.detach(), B @ A))


def rounded(gain, probability, *, rescale=True):
    """The mask of ones and zeros behind a gain, which must be 0 or 1/k everywhere."""
    height = 1 / (1 - probability) if rescale else 1.0
    mask = (gain > height / 2).to(DOUBLE)
    assert (gain - height * mask).abs().max() < 1e-8
    return mask


def thinned(kind, gain, x, B, A):
    """The branch with this gain, differentiable."""
    if kind == "input":
        return SCALE * F.linear(F.linear(gain * x, A), B)
    if kind == "rank":
        return SCALE * F.linear(gain * F.linear(x, A), B)
    return gain * (SCALE * F.linear(F.linear(x, A), B))


class Siblings(nn.Module):
    """q, k and v of one input, without a base of their own."""

    def __init__(self, width, dtype=DOUBLE):
        super().__init__()
        for name in "qkv":
            layer = nn.Linear(width, width, bias=False).to(dtype)
            put(layer.weight, 0.0)
            self.add_module(name, layer)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


class Nested(nn.Module):
    """Layers in a row, (6, 5), (5, 6), (6, 5), each inside `depth` checkpoints."""

    def __init__(self, depth, *, reentrant=False, layers=3):
        super().__init__()
        self.depth, self.reentrant = depth, reentrant
        self.layers = nn.ModuleList(linear(*((N, M) if k % 2 else (M, N)), seed=k) for k in range(layers))

    def run(self, layer, x, depth):
        if depth == 0:
            return layer(x)
        return checkpoint(lambda inner: self.run(layer, inner, depth - 1), x, use_reentrant=self.reentrant)

    def forward(self, x):
        for layer in self.layers:
            x = self.run(layer, x, self.depth)
        return x


def test_1_siblings_share_the_mask_of_their_input():
    width = 24
    model, x, eye = Siblings(width), randn(40, width, seed=1), torch.eye(width, dtype=DOUBLE)
    handle = rw.adapt_(model, lora_dropout(rank=width, alpha=width, probability=0.5), where=["q", "k", "v"])
    order = torch.randperm(width, generator=torch.Generator().manual_seed(2))
    for site, factor in {"q": eye, "k": eye[order], "v": -4 * eye}.items():  # products with these are exact
        put(handle.parameterization(site).roles()["B"], eye)
        put(handle.parameterization(site).roles()["A"], factor)
    q, k, v = (y.detach() for y in model.train()(x))
    by_hand = 2 * rounded(q / x, 0.5) * x  # x dropped once
    assert torch.equal(q, by_hand) and torch.equal(k, by_hand[:, order]) and torch.equal(v, -4 * by_hand)
    again = rounded(model(x)[0].detach() / x, 0.5)  # the next forward
    assert not torch.equal(2 * again * x, by_hand)


def test_1_siblings_equal_those_of_an_input_dropped_by_hand():
    width = 24
    model, x = Siblings(width), randn(40, width, seed=1)
    handle = rw.adapt_(model, lora_dropout(rank=width, alpha=width, probability=0.5), where=["q", "k", "v"])
    fill(handle)
    for factor in handle.parameterization("q").roles().values():
        put(factor, torch.eye(width, dtype=DOUBLE))  # q gives x̃ itself
    q, k, v = (y.detach() for y in model.train()(x))
    model.eval()
    for found, expected in zip((k, v), model(q)[1:], strict=True):
        close(found, expected, 1e-14)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.75])
def test_1_kept_share(probability):
    width = 64
    model, x = Siblings(width), torch.ones(64, width, dtype=DOUBLE)
    handle = rw.adapt_(model, lora_dropout(rank=width, alpha=width, probability=probability), where=["q", "k", "v"])
    for factor in handle.parameterization("q").roles().values():
        put(factor, torch.eye(width, dtype=DOUBLE))
    share = float((model.train()(x)[0] != 0).double().mean())
    assert abs(share - (1 - probability)) < 4 * math.sqrt(probability * (1 - probability) / 64**2)


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("kind", ["rank", "module"])
def test_1_kept_share_of_small_masks(kind, granularity):
    x = randn(1000, N, seed=1) if granularity == "token" else randn(1000, 1, N, seed=1)
    model, _, *rest = generic(kind, probability=0.25, granularity=granularity)
    mask = rounded(gains(kind, model(x), x, *rest), 0.25).reshape(1000, -1)
    draws = 1000 * (R if kind == "rank" else 1)
    assert abs(float(mask.mean()) - 0.75) < 4 * math.sqrt(0.25 * 0.75 / draws)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_definition_and_default_granularity(kind, rescale):
    x, patterns = randn(4, 6, N, seed=1), []
    model, handle, *rest = generic(kind, probability=0.25, rescale=rescale)
    for _ in range(8):
        mask = rounded(gains(kind, model(x).detach(), x, *rest), 0.25, rescale=rescale)
        if kind in ("rank", "row", "module"):  # one mask per call
            assert torch.equal(mask, mask[:1, :1].expand_as(mask))
        else:
            assert 0 < mask.mean() < 1 and not torch.equal(mask, mask[:1].expand_as(mask))
        if kind == "module":
            assert torch.equal(mask, mask[..., :1].expand_as(mask))
        patterns.append(mask)
    assert len({tuple(mask.flatten().tolist()) for mask in patterns}) > 1
    model.eval()
    B, A, W, bias = rest
    close(model(x), F.linear(x, W + SCALE * B @ A, bias), 1e-12)
    close(handle.update_of("layer").dense(), SCALE * B @ A, 1e-12)


@pytest.mark.parametrize("granularity", ["call", "sample", "token"])
@pytest.mark.parametrize("kind", ["rank", "module"])
def test_granularity(kind, granularity):
    x = randn(12, 10, N, seed=1)
    model, _, *rest = generic(kind, granularity=granularity)
    mask = rounded(gains(kind, model(x), x, *rest), 0.5)
    same_tokens = torch.equal(mask, mask[:, :1].expand_as(mask))
    same_samples = torch.equal(mask, mask[:1].expand_as(mask))
    assert same_tokens == (granularity != "token") and same_samples == (granularity == "call")


@pytest.mark.parametrize(("depth", "reentrant"), [(0, False), (1, False), (1, True), (3, False)])
@pytest.mark.parametrize(
    ("kind", "granularity"), [*((kind, "call") for kind in KINDS), ("rank", "sample"), ("module", "token")]
)
def test_2_gradients_meet_the_mask_of_the_forward(kind, depth, reentrant, granularity):
    x, g = randn(4, 3, N, seed=1).requires_grad_(True), randn(4, 3, M, seed=2)
    model = Nested(depth, reentrant=reentrant, layers=1)
    W, bias = model.layers[0].weight.detach().clone(), model.layers[0].bias.detach().clone()
    recipe = lora_dropout(rank=R, alpha=ALPHA, kind=kind, probability=0.5, granularity=granularity)
    handle = rw.adapt_(model, recipe, where=["layers.0"])
    fill(handle)
    B, A = (handle.parameterization("layers.0").roles()[role] for role in "BA")
    model.train()
    for _ in range(3):  # later forwards too
        for tensor in (x, B, A):
            tensor.grad = None
        y = model(x)
        gain = 2 * rounded(gains(kind, y, x, B, A, W, bias), 0.5)
        (y * g).sum().backward()
        copies = [tensor.detach().clone().requires_grad_(True) for tensor in (x, B, A)]
        expected = F.linear(copies[0], W, bias) + thinned(kind, gain, *copies)
        close(y, expected, 1e-10)
        (expected * g).sum().backward()
        for tensor, copy in zip((x, B, A), copies, strict=True):
            close(grad(tensor), grad(copy), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_2_checkpoints_change_nothing_in_a_deep_model(kind):
    results = []
    for depth in (0, 1, 3):
        model, x = Nested(depth), randn(4, N, seed=1).requires_grad_(True)
        recipe = lora_dropout(rank=3, kind=kind, probability=0.5)
        handle = rw.adapt_(model, recipe, where=["layers.0", "layers.1", "layers.2"])
        fill(handle)
        model.train()
        outputs = [model(x), model(2 * x)]  # two micro-batches before the backward of the first
        outputs[0].square().sum().backward()
        outputs[1].sum().backward()
        results.append([y.detach() for y in outputs] + [grad(t) for block in handle.blocks().values() for t in block.values()])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            close(found, expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_3_the_mean_over_masks_is_the_output_of_eval(kind):
    draws, x = 4000, randn(1, N, seed=1)
    options = {"granularity": "token"} if kind in ("rank", "module") else {}
    model, _, B, A, W, bias = generic(kind, probability=0.25, **options)
    with torch.no_grad():
        calls = draws if kind == "row" else 1  # one mask per call
        outputs = torch.cat([model(x.repeat(draws // calls, 1)) for _ in range(calls)])
    errors = outputs.std(0) / math.sqrt(draws)
    assert errors.min() > 0
    assert ((outputs.mean(0) - F.linear(x, W + SCALE * B @ A, bias)[0]).abs() < 5 * errors).all()


def saved_bytes(function):
    """Bytes that autograd keeps for the backward of what a function computes, shared storage counted once."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(function())
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_4_without_dropout_it_is_lora_and_saves_no_more(kind):
    x = randn(50, N, seed=1)
    model, _, B, A, *_ = generic(kind, probability=0.0)
    other, _, q = adapted(rw.catalog.lora(rank=R, alpha=ALPHA), linear(M, N))
    put(q.roles()["B"], B)
    put(q.roles()["A"], A)
    other.train()
    assert torch.equal(model(x), other(x))
    assert saved_bytes(lambda: model(x)) == saved_bytes(lambda: other(x))
    # nor in eval with dropout
    silent, *_ = generic(kind, probability=0.5)
    silent.eval()
    assert torch.equal(silent(x), model(x))
    assert saved_bytes(lambda: silent(x)) == saved_bytes(lambda: other(x))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_4_certain_dropout_leaves_the_base(kind, rescale):
    x, g = randn(50, N, seed=1), randn(50, M, seed=2)
    model, _, B, A, W, bias = generic(kind, probability=1.0, rescale=rescale)
    x.requires_grad_(True)
    for _ in range(3):
        y = model(x)
        close(y, F.linear(x, W, bias), 1e-14)
    backward(model, x, g)
    for tensor in (B, A):
        assert tensor.grad is None or torch.equal(tensor.grad, torch.zeros_like(tensor))
    close(grad(x), g @ W, 1e-12)


@pytest.mark.parametrize("kind", ["rank", "module"])
def test_5_of_one_rank_all_or_nothing(kind):
    # With r = 1 the one rank is the module: the same two outcomes, with the same odds.
    x, kept = randn(7, N, seed=1), 0
    model, _, B, A, W, bias = generic(kind, rank=1, probability=0.25)
    base, whole = F.linear(x, W, bias), F.linear(x, W + SCALE / 0.75 * (B @ A).detach(), bias)
    with torch.no_grad():
        for _ in range(300):
            y = model(x)
            on = bool((y - whole).norm() < (y - base).norm())
            close(y, whole if on else base, 1e-12)
            kept += on
    assert abs(kept / 300 - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 300)


def test_5_dropped_rows_are_the_base_to_the_bit():
    x, dropped = randn(9, N, seed=1), 0
    model, _, *rest = generic("row")
    with rw.switched_off(model):
        base = model(x).detach()
    for _ in range(10):
        y = model(x).detach()
        mask = rounded(gains("row", y, x, *rest), 0.5)[0]
        assert torch.equal(y[:, mask == 0], base[:, mask == 0])
        dropped += int((mask == 0).sum())
    assert 0 < dropped < 10 * M


def test_6_siblings_keep_one_mask_of_bits():
    tokens, width = 512, 64
    x, sizes = randn(tokens, width, seed=1, dtype=torch.float32), []
    for probability in (0.0, 0.5):
        model = Siblings(width, torch.float32).train()
        rw.adapt_(model, lora_dropout(rank=8, probability=probability), where=["q", "k", "v"])
        sizes.append(saved_bytes(lambda model=model: model(x)))
    assert sizes[0] >= x.numel() * 4  # x itself
    assert sizes[1] - sizes[0] <= tokens * width / 8 + 2048


@pytest.mark.parametrize("kind", KINDS)
def test_7_the_global_generator_is_untouched(kind):
    x, layer = randn(8, N, seed=1), linear(M, N)
    before = torch.get_rng_state()
    model, handle, _ = adapted(lora_dropout(rank=R, kind=kind, probability=0.5), layer)
    fill(handle)
    for _ in range(3):
        model.train()(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    # and it has no say: the same seed draws the same masks, another seed others
    outputs = []
    for seed, other_state in ((0, 1), (0, 2), (1, 1)):
        model, *_ = generic(kind, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(other_state)
            outputs.append(torch.stack([model(x).detach() for _ in range(20)]))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["rank", "module"])
def test_7_layers_throw_coins_of_their_own(kind):
    model, x, alike = Siblings(N), randn(3, N, seed=1), 0
    handle = rw.adapt_(model, lora_dropout(rank=1, kind=kind, probability=0.5), where=["q", "k", "v"])
    fill(handle)
    model.train()
    with torch.no_grad():
        for _ in range(60):
            on = [bool(y.any()) for y in model(x)]
            alike += len(set(on)) == 1
    assert alike < 40  # 15 of 60 expected; a shared coin would give 60


def test_7_nothing_is_stored():
    model, handle, *_ = generic("input")
    model(randn(3, N, seed=1))
    plain = {"layer.weight", "layer.bias"}
    assert set(model.state_dict()) == plain | {f"layer.adapter.default.{role}" for role in "AB"}
    assert set(handle.blocks()["layer"]) == {"A", "B"}
