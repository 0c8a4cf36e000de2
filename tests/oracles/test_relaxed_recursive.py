"""Relaxed recursive transformers against their spec (arXiv:2410.20672): K blocks looped, each depth with a LoRA of its own.

Depths are counted from 0: depth l uses shared block l mod K. Norms start equal in all layers here, since only linear maps get a
LoRA and oracle 1 holds for what they can express. Accuracy, early exit and throughput claims are not tested.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from tests.oracles.tools import close, grad, put, randn

relaxed_recursive = rw.catalog.relaxed_recursive
WIDTH, HIDDEN, INPUTS, OUTPUTS = 6, 9, 5, 4
PATHS = {"mix": (WIDTH, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
SHARED = ["average", "stepwise", "lower", "random"]


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)
        for k, (path, (m, n)) in enumerate(PATHS.items()):
            layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
            put(layer.weight, randn(m, n, seed=10 * seed + k))
            setattr(self, path, layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) + torch.sin(self.mix(x))


class Toy(nn.Module):
    def __init__(self, depth: int, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH, dtype=torch.float64)
        self.layers = nn.ModuleList([Block(100 * seed + k + 1) for k in range(depth)])
        self.head = nn.Linear(WIDTH, OUTPUTS, dtype=torch.float64)
        for k, tensor in enumerate([*self.embed.parameters(), *self.head.parameters()]):
            put(tensor, randn(*tensor.shape, seed=7000 + k))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def weights_of(model: Toy) -> list[dict[str, Tensor]]:
    return [{path: layer.get_submodule(path).weight.detach().clone() for path in PATHS} for layer in model.layers]


def by_hand(model: Toy, weights: list[dict[str, Tensor]], x: Tensor) -> Tensor:
    """The forward of a toy with these weights at its depths (norms without an effect of their own)."""
    x = x @ model.embed.weight.t() + model.embed.bias
    for W in weights:
        normed = nn.functional.layer_norm(x, (WIDTH,))
        x = x + torch.tanh(normed @ W["up"].t()) @ W["down"].t() + torch.sin(x @ W["mix"].t())
    return x @ model.head.weight.t() + model.head.bias


def build(depth: int = 6, **options):
    """(original, its weights, the relaxed model)."""
    original = Toy(depth)
    return original, weights_of(original), relaxed_recursive(copy.deepcopy(original), **options)


def shared_weight(relaxed, block: int, path: str) -> Tensor:
    return relaxed.shared_blocks[block].get_submodule(path).weight


def residual(relaxed, weights: list[dict[str, Tensor]], depth: int, path: str) -> Tensor:
    """R_l = W_l - W'_{p(l)}."""
    return weights[depth][path] - shared_weight(relaxed, depth % len(relaxed.shared_blocks), path).detach()


def effective(relaxed, depth: int) -> dict[str, Tensor]:
    K = len(relaxed.shared_blocks)
    return {path: shared_weight(relaxed, depth % K, path) + relaxed.update_of(depth, path).dense() for path in PATHS}


X = randn(7, INPUTS, seed=1)


@pytest.mark.parametrize("loops", [2, 3])
@pytest.mark.parametrize("shared", SHARED)
def test_1_full_rank_reproduces_the_original(shared, loops):
    original, weights, relaxed = build(loops=loops, rank=HIDDEN, shared=shared)
    assert len(relaxed.shared_blocks) == 6 // loops
    close(relaxed.model(X), original(X), 1e-10)
    for depth, kept in enumerate(weights):
        for path in PATHS:
            close(effective(relaxed, depth)[path], kept[path], 1e-10)
    # not by keeping the layers apart: the model holds 6 / loops blocks and low-rank factors
    factors = sum(min(m, n) * (m + n) for m, n in PATHS.values())
    block = sum(tensor.numel() for tensor in original.layers[0].parameters())
    outside = sum(tensor.numel() for part in (original.embed, original.head) for tensor in part.parameters())
    assert sum(tensor.numel() for tensor in relaxed.model.parameters()) == outside + 6 // loops * block + 6 * factors


def expected_blocks(weights: list[dict[str, Tensor]], shared: str, K: int) -> list[dict[str, Tensor]]:
    L = len(weights)
    if shared == "average":
        return [{path: torch.stack([weights[d][path] for d in range(k, L, K)]).mean(0) for path in PATHS} for k in range(K)]
    if shared == "lower":
        return weights[:K]
    return [weights[i * (L - 1) // max(K - 1, 1)] for i in range(K)]


@pytest.mark.parametrize(("depth", "loops"), [(6, 2), (6, 3), (4, 2), (8, 2), (4, 4)])
@pytest.mark.parametrize("shared", ["average", "stepwise", "lower"])
def test_1_zero_loras_are_the_strictly_recursive_model(shared, depth, loops):
    original, weights, relaxed = build(depth, loops=loops, rank=2, shared=shared, start="zero")
    K = depth // loops
    blocks = expected_blocks(weights, shared, K)
    for k, expected in enumerate(blocks):
        for path in PATHS:
            close(shared_weight(relaxed, k, path).detach(), expected[path], 1e-12)
    close(relaxed.model(X), by_hand(original, blocks * loops, X), 1e-12)
    for depth_ in range(depth):
        for path in PATHS:
            pair = relaxed.update_of(depth_, path)
            assert not pair.B.any() and pair.A.abs().max() > 0 and pair.scale == 1.0


def test_1_stepwise_sources_of_the_paper():
    _, weights, relaxed = build(6, loops=2, rank=2, shared="stepwise")
    for k, source in enumerate((1, 3, 6)):  # counted from 1, as in the paper
        close(shared_weight(relaxed, k, "up").detach(), weights[source - 1]["up"], 1e-15)


@pytest.mark.parametrize("shared", SHARED)
def test_2_each_lora_is_the_best_of_its_rank(shared):
    totals = []
    for rank in (1, 2, 4, 6):
        _, weights, relaxed = build(loops=2, rank=rank, shared=shared)
        total = 0.0
        for depth in range(6):
            for path in PATHS:
                R = residual(relaxed, weights, depth, path)
                pair = relaxed.update_of(depth, path)
                error = float((R - pair.dense().detach()).square().sum())
                discarded = float(torch.linalg.svdvals(R)[rank:].square().sum())
                assert error == pytest.approx(discarded, rel=1e-8, abs=1e-18 * float(weights[depth][path].square().sum()))
                assert pair.rank == min(rank, *PATHS[path])
                total += error
        totals.append(total)
    assert all(later <= earlier * (1 + 1e-10) for earlier, later in itertools.pairwise(totals))
    assert totals[0] > 1.2 * totals[1]


def test_2_the_singular_values_stand_in_the_output_factor():
    _, weights, relaxed = build(loops=2, rank=2)
    for depth in range(6):
        R, pair = residual(relaxed, weights, depth, "up"), relaxed.update_of(depth, "up").folded()
        close((pair.A @ pair.A.t()).detach(), torch.eye(2, dtype=torch.float64), 1e-10)
        close((pair.B.t() @ pair.B).detach(), torch.diag(torch.linalg.svdvals(R)[:2].square()), 1e-10)


def test_2_averaging_leaves_least():
    left = {}
    for shared in SHARED:
        _, weights, relaxed = build(loops=2, rank=1, shared=shared)
        left[shared] = sum(
            float(residual(relaxed, weights, depth, path).square().sum()) for depth in range(6) for path in PATHS
        )
    assert left["average"] == min(left.values()) and all(
        left[other] > left["average"] * 1.01 for other in SHARED if other != "average"
    )
    _, weights, _ = build(loops=2, rank=1)
    least = sum(float((weights[k][path] - weights[k + 3][path]).square().sum()) / 2 for k in range(3) for path in PATHS)
    assert left["average"] == pytest.approx(least, rel=1e-10)


@pytest.mark.parametrize("loops", [2, 3])
def test_3_averaged_residuals_cancel(loops):
    _, weights, relaxed = build(loops=loops, rank=3)
    K = 6 // loops
    for k in range(K):
        for path in PATHS:
            residuals = [residual(relaxed, weights, depth, path) for depth in range(k, 6, K)]
            assert float(sum(residuals).norm()) < 1e-13
            if loops == 2:
                one, other = (relaxed.update_of(depth, path).dense().detach() for depth in (k, k + K))
                close(one, -other, 1e-10)
                close(torch.linalg.svdvals(one), torch.linalg.svdvals(other), 1e-10)


@pytest.mark.parametrize(("shared", "copied"), [("lower", {0, 1, 2}), ("stepwise", {0, 5})])
def test_3_a_copied_depth_gets_a_zero_start(shared, copied):
    """Counted from 1, stepwise block 2 is layer 3 and serves depths 2 and 5: there no depth is a copy."""
    _, weights, relaxed = build(6, loops=2, rank=2, shared=shared)
    for depth in range(6):
        for path in PATHS:
            pair = relaxed.update_of(depth, path)
            if depth in copied:
                assert not residual(relaxed, weights, depth, path).any()
                assert not pair.dense().any() and not pair.B.any() and pair.A.abs().max() > 0
            else:
                assert pair.dense().norm() > 0.1
    before = relaxed.model(X).detach()
    for depth in copied:
        put(relaxed.update_of(depth, "up").A, randn(2, WIDTH, seed=depth))
    assert torch.equal(relaxed.model(X), before)  # B is zero there


def count(width: int, hidden: int, queries: int, keys: int, layers: int, loops: int, rank: int) -> tuple[int, int, int]:
    """Numbers of a gated block, of a LoRA per rank unit and layer, and of the whole relaxed model without embeddings."""
    maps = [(queries, width), (keys, width), (keys, width), (width, queries), (hidden, width), (hidden, width), (width, hidden)]
    block = sum(m * n for m, n in maps)
    return (
        block,
        sum(m + n for m, n in maps),
        layers // loops * block + layers * sum(min(rank, m, n) * (m + n) for m, n in maps),
    )


def test_4_numbers_of_the_paper():
    for rank, total in {64: 1.07, 128: 1.15, 256: 1.30, 512: 1.60}.items():
        _, per_rank, found = count(2048, 16384, 2048, 256, 18, 2, rank)
        assert per_rank == 68_096
        assert found / 1e9 == pytest.approx(total, abs=0.006)


@pytest.mark.parametrize("loops", [2, 3])
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_4_numbers_of_a_model(loops, rank):
    original, _, relaxed = build(loops=loops, rank=rank)
    block = sum(tensor.numel() for tensor in original.layers[0].parameters())
    factors = sum(min(rank, m, n) * (m + n) for m, n in PATHS.values())
    outside = sum(tensor.numel() for part in (original.embed, original.head) for tensor in part.parameters())
    total = sum(tensor.numel() for tensor in relaxed.model.parameters())  # each tensor once
    assert total == outside + 6 // loops * block + 6 * factors


@pytest.mark.parametrize("shared", SHARED)
def test_5_a_shared_weight_gathers_the_gradients_of_its_depths(shared):
    original, _, relaxed = build(loops=3, rank=2, shared=shared)
    g = randn(7, OUTPUTS, seed=2)
    weights = [{path: W.detach().clone().requires_grad_() for path, W in effective(relaxed, d).items()} for d in range(6)]
    close(relaxed.model(X), by_hand(original, weights, X), 1e-12)
    (by_hand(original, weights, X) * g).sum().backward()
    (relaxed.model(X) * g).sum().backward()
    for k in range(2):
        for path in PATHS:
            expected = sum(grad(weights[depth][path]) for depth in range(k, 6, 2))
            close(grad(shared_weight(relaxed, k, path)), expected, 1e-10)
    for depth in range(6):  # and every depth's own factors get the gradient of that depth alone
        for path in PATHS:
            pair, G = relaxed.update_of(depth, path), grad(weights[depth][path])
            close(grad(pair.A), pair.scale * pair.B.t() @ G, 1e-10)
            close(grad(pair.B), pair.scale * G @ pair.A.t(), 1e-10)


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_5_a_lora_acts_at_its_depth_alone(depth):
    original, _, relaxed = build(loops=2, rank=2)
    before = [{path: W.detach().clone() for path, W in effective(relaxed, d).items()} for d in range(6)]
    pair = relaxed.update_of(depth, "down")
    put(pair.A, pair.A + randn(*pair.A.shape, seed=3))
    after = [effective(relaxed, d) for d in range(6)]
    for d in range(6):
        for path in PATHS:
            same = torch.equal(after[d][path], before[d][path])
            assert same == ((d, path) != (depth, "down"))
    before[depth]["down"] = after[depth]["down"].detach()
    close(relaxed.model(X), by_hand(original, before, X), 1e-12)


def test_unrolling_gives_an_ordinary_model():
    original, _, relaxed = build(loops=2, rank=2)
    for depth in range(6):
        for path in PATHS:
            put(relaxed.update_of(depth, path).B, randn(PATHS[path][0], 2, seed=50 + depth))
    y = relaxed.model(X).detach()
    expected = [{path: W.detach().clone() for path, W in effective(relaxed, d).items()} for d in range(6)]
    plain = relaxed.unroll_()
    close(plain(X), y, 1e-12)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in original.named_parameters()}
    assert len({tensor.data_ptr() for tensor in plain.parameters()}) == len(list(original.parameters()))  # none shared
    for layer, kept in zip(plain.layers, expected, strict=True):
        assert type(layer) is Block
        for path in PATHS:
            close(layer.get_submodule(path).weight.detach(), kept[path], 1e-12)


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    for k, tensor in enumerate(model.parameters()):
        if tensor.dim() == 2:  # norms stay at one
            put(tensor, 0.3 * randn(*tensor.shape, seed=k))
    return model


def test_1_full_rank_reproduces_the_logits_of_a_language_model():
    model = llama()
    tokens = torch.arange(9)[None] * 7 % 30
    expected = model(tokens).logits.detach()
    relaxed = relaxed_recursive(model, loops=2, rank=24)
    close(relaxed.model(tokens).logits.detach(), expected, 1e-10)


def test_6_decoding_with_a_cache_is_the_full_forward():
    relaxed = relaxed_recursive(llama(), loops=2, rank=3)
    tokens, cache, steps = torch.arange(9)[None] * 7 % 30, None, []
    whole = relaxed.model(tokens).logits.detach()
    for piece in (tokens[:, :4], *tokens[:, 4:].split(1, dim=1)):
        found = relaxed.model(piece, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        steps.append(found.logits.detach())
    close(torch.cat(steps, 1), whole, 1e-5)
    assert cache.get_seq_length() == 9
    keys = [layer.keys for layer in cache.layers]
    assert len(keys) == 4 and all(one.shape[2] == 9 for one in keys)  # per depth, not per block
    assert float((keys[0] - keys[2]).norm()) > 1e-3
