"""Oracles of LoKr: W' = W + s·C ⊗ D with a small C and a large D, each full or a product of two factors, s = α/r.

The order in which the two factors are applied is tested by counting floating-point operations.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rankwise as rw
from rankwise.parameterizations import lokr as module
from tests.oracles.tools import DOUBLE, One, adapted, backward, close, fill, grad, linear, put, randn

lokr = rw.catalog.lokr
M, N, ALPHA = 48, 32, 5.0  # splits (6, 8) and (4, 8)
CONFIGURATIONS = [
    {"rank": 2},
    {"rank": 2, "decompose_both": True},
    {"rank": 8},  # D full
    {"rank": 2, "factor": 4},
]


def factors(roles, kernel=()):
    """C (m₁, n₁) and D (m₂, n₂, kernel…) from the trained tensors."""
    C = roles["C"] if "C" in roles else roles["C_B"] @ roles["C_A"]
    if "D" in roles:
        D = roles["D"]
    elif "T" in roles:
        D = torch.einsum("ab...,ao,bi->oi...", roles["T"], roles["P"], roles["Q"])
    else:
        D = (roles["D_B"] @ roles["D_A"]).reshape(len(roles["D_B"]), -1, *kernel)
    return C, D


def count_flops(function):
    """Floating-point operations of the matrix products of a call, products added in place included."""

    def product(total, left, right, *, out_shape=None, **_):
        return 2 * left[-2] * left[-1] * right[-1] * (left[0] if len(left) == 3 else 1)

    in_place = {torch.ops.aten.addmm_: product, torch.ops.aten.baddbmm_: product}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        result = function()
    return counter.get_total_flops(), result


def kronecker(C, D, scale):
    """The update from its definition, entry (a m₂ + b, c n₂ + d) = s C[a, c] D[b, d]; C is spread over the kernel."""
    (m1, n1), (m2, n2) = C.shape, D.shape[:2]
    return scale * torch.einsum("ac,bd...->abcd...", C, D).reshape(m1 * m2, n1 * n2, *D.shape[2:])


def generic(layer=None, *, rank=2, **options):
    """(model, handle, roles, W) at a generic point."""
    layer = linear(M, N) if layer is None else layer
    W = layer.weight.detach().clone()
    model, handle, p = adapted(lokr(**{"rank": rank, "alpha": ALPHA, **options}), layer)
    fill(handle)
    return model, handle, p.roles(), W


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_1_factor_by_factor_is_the_kronecker_product(options):
    x = randn(3, 4, N, seed=1)
    model, handle, roles, W = generic(**options)
    C, D = factors(roles)
    delta = kronecker(C, D, ALPHA / options["rank"])
    close(delta, ALPHA / options["rank"] * torch.kron(C.detach().contiguous(), D.detach().contiguous()), 1e-14)
    close(model(x), F.linear(x, W + delta, model.layer.bias), 1e-12)
    close(handle.update_of("layer").dense(), delta, 1e-12)
    for tokens in (0, 1, 200):
        rows = randn(tokens, N, seed=2)
        close(model(rows), F.linear(rows, W + delta, model.layer.bias), 1e-12)


@pytest.mark.parametrize(("options", "names"), list(zip(CONFIGURATIONS, [
    {"lokr_w1": "C", "lokr_w2_a": "D_B", "lokr_w2_b": "D_A"},
    {"lokr_w1_a": "C_B", "lokr_w1_b": "C_A", "lokr_w2_a": "D_B", "lokr_w2_b": "D_A"},
    {"lokr_w1": "C", "lokr_w2": "D"},
    {"lokr_w1": "C", "lokr_w2_a": "D_B", "lokr_w2_b": "D_A"},
], strict=True)))  # fmt: skip
def test_1_equals_peft(options, names):
    peft = pytest.importorskip("peft")
    _, handle, roles, _ = generic(**options)
    assert set(roles) == set(names.values())
    other = One(linear(M, N))
    config = peft.LoKrConfig(
        r=options["rank"],
        alpha=ALPHA,
        decompose_both=options.get("decompose_both", False),
        decompose_factor=options.get("factor", -1),
        target_modules=["layer"],
    )
    peft.inject_adapter_in_model(config, other)
    for name, role in names.items():
        put(getattr(other.layer, name)["default"], roles[role])
    close(handle.update_of("layer").dense(), other.layer.get_delta_weight("default").detach(), 1e-12)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"rank": 2}, {"C", "D_B", "D_A"}),
        ({"rank": 4}, {"C", "D"}),
        ({"rank": 2, "tucker": True}, {"C", "T", "P", "Q"}),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_1_convolution(options, names, groups):
    geometry = {"stride": 2, "padding": 1, "groups": groups}
    layer, x = nn.Conv2d(20, 12, 3, **geometry).to(DOUBLE), randn(2, 20, 7, 6, seed=1)
    base = layer(x).detach()
    model, handle, p = adapted(lokr(alpha=ALPHA, **options), layer)
    roles, W = p.roles(), layer.weight.detach().clone()
    assert set(roles) == names
    assert torch.equal(model(x), base)
    fill(handle)
    C, D = factors(roles, (3, 3))
    assert C.shape == ((3, 4) if groups == 1 else (3, 2))  # the splits of 12 and 20 / groups: channels only
    delta = kronecker(C, D, ALPHA / options["rank"])
    close(model(x), F.conv2d(x, W + delta, layer.bias, **geometry), 1e-12)
    close(handle.update_of("layer").dense(), delta.flatten(1), 1e-12)


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_2_rank_norm_and_singular_values(options):
    _, handle, roles, _ = generic(**options)
    C, D = (factor.detach() for factor in factors(roles))
    delta, s = handle.update_of("layer").dense().detach(), ALPHA / options["rank"]
    rank = torch.linalg.matrix_rank(C, rtol=1e-10) * torch.linalg.matrix_rank(D, rtol=1e-10)
    assert torch.linalg.matrix_rank(delta, rtol=1e-10) == rank
    assert float(delta.norm()) == pytest.approx(float(s * C.norm() * D.norm()), rel=1e-12)
    products = torch.outer(torch.linalg.svdvals(C), torch.linalg.svdvals(D)).flatten().sort(descending=True).values
    close(torch.linalg.svdvals(delta), s * torch.cat([products, torch.zeros(32 - len(products), dtype=DOUBLE)]), 1e-12)


def test_2_export_is_a_lora_of_the_product_rank():
    _, handle, roles, _ = generic(rank=2, decompose_both=True)
    pair = handle.low_rank_of("layer")
    assert pair is not None and pair.rank == 4
    close(pair.dense(), kronecker(*factors(roles), ALPHA / 2), 1e-12)


def test_3_a_small_factor_of_size_one_leaves_lora():
    x = randn(9, 5, seed=1)  # prime sides: 7 = 1 · 7, 5 = 1 · 5
    model, _, roles, _ = generic(linear(7, 5), rank=2)
    assert roles["C"].shape == (1, 1) and roles["D_B"].shape == (7, 2)
    put(roles["C"], 1.0)
    other, _, q = adapted(rw.catalog.lora(rank=2, alpha=ALPHA), linear(7, 5))
    put(q.roles()["B"], roles["D_B"])
    put(q.roles()["A"], roles["D_A"])
    close(model(x), other(x), 1e-12)


def test_3_an_identity_makes_equal_diagonal_blocks():
    _, handle, roles, _ = generic(factor=4)  # C (4, 4), D (12, 8)
    put(roles["C"], torch.eye(4, dtype=DOUBLE))
    D = factors(roles)[1].detach()
    close(handle.update_of("layer").dense(), ALPHA / 2 * torch.block_diag(D, D, D, D), 1e-12)


def test_3_a_large_factor_of_size_one_leaves_c():
    _, handle, roles, _ = generic(linear(4, 4), factor=4)  # splits (4, 1) and (4, 1)
    assert roles["C"].shape == (4, 4) and roles["D"].shape == (1, 1)
    close(handle.update_of("layer").dense(), ALPHA / 2 * roles["D"] * roles["C"], 1e-12)


@pytest.mark.parametrize(
    ("dim", "factor", "expected"),
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (4096, -1, (64, 64)),
        (11008, -1, (86, 128)),
        (50257, -1, (29, 1733)),
        (768, -1, (24, 32)),
        (128, 5, (4, 32)),
    ],
)
def test_4_split_rule(dim, factor, expected):
    assert tuple(module.split(dim, factor)) == expected


def test_4_split_rule_by_brute_force():
    for dim in range(1, 150):
        pairs = [(p, dim // p) for p in range(1, dim + 1) if dim % p == 0]
        assert tuple(module.split(dim, -1)) == max(pair for pair in pairs if pair[0] <= pair[1])  # the most square one
        for factor in range(1, 20):
            small = [pair for pair in pairs if pair[0] <= factor and pair[0] <= pair[1]]
            assert tuple(module.split(dim, factor)) == ((factor, dim // factor) if dim % factor == 0 else max(small)), (
                dim,
                factor,
            )


def test_5_gauge():
    x = randn(9, N, seed=1)
    model, _, roles, _ = generic(rank=8)
    before = model(x).detach()
    put(roles["C"], 7.0 * roles["C"])
    assert (model(x) - before).norm() > 0.1
    put(roles["D"], roles["D"] / 7.0)
    close(model(x), before, 1e-12)


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_6_gradients(options):
    x, g = randn(11, N, seed=1), randn(11, M, seed=2)
    model, _, roles, W = generic(**options)
    x.requires_grad_(True)
    backward(model, x, g)
    copies = {role: tensor.detach().clone().requires_grad_(True) for role, tensor in roles.items()}
    plain = x.detach().clone().requires_grad_(True)
    delta = kronecker(*factors(copies), ALPHA / options["rank"])
    (F.linear(plain, W + delta, model.layer.bias) * g).sum().backward()
    for role, tensor in roles.items():
        close(grad(tensor), grad(copies[role]), 1e-10)
    close(grad(x), grad(plain), 1e-10)


@pytest.mark.parametrize("zero", ["C", "D"])
@pytest.mark.parametrize("options", CONFIGURATIONS)
@pytest.mark.parametrize("layout", ["linear", "conv", "embedding"])
def test_7_starts_at_the_base_to_the_bit(layout, options, zero):
    if layout == "linear":
        layer, x = linear(M, N), randn(9, N, seed=1)
    elif layout == "conv":
        layer, x = nn.Conv2d(N, M, 3).to(DOUBLE), randn(2, N, 5, 5, seed=1)
    else:
        layer, x = nn.Embedding(M, N).to(DOUBLE), torch.arange(M).reshape(2, -1)
    base = layer(x).detach()
    model, _, p = adapted(lokr(alpha=ALPHA, zero=zero, **options), layer)
    assert torch.equal(model(x), base)
    dead = [role for role, tensor in p.roles().items() if not tensor.any()]
    assert len(dead) == 1 and dead[0][0] == zero  # one factor alone, so that it can leave
    model(x).sum().backward()
    assert grad(p.roles()[dead[0]]).abs().max() > 0


@pytest.mark.parametrize("wanted", ["C", "D"])
@pytest.mark.parametrize("rank", [2, 99])  # D of low rank, D full
def test_8_the_cheaper_order_runs(rank, wanted):
    # Splits (2, 31) and (8, 8): what is applied first decides, and which it should be depends on the side.
    (m, n), tokens = ((62, 64) if wanted == "C" else (64, 62)), 50
    x = randn(tokens, n, seed=1)
    model, _, roles, W = generic(linear(m, n), rank=rank)
    C, D = factors(roles)
    (m1, n1), (m2, n2) = C.shape, D.shape
    if "D" in roles:
        orders = {"D": 2 * n1 * n2 * m2 + 2 * m1 * n1 * m2, "C": 2 * m1 * n1 * n2 + 2 * m1 * n2 * m2}
    else:
        orders = {"D": 2 * n1 * rank * (n2 + m2) + 2 * m1 * n1 * m2, "C": 2 * m1 * n1 * n2 + 2 * m1 * rank * (n2 + m2)}
    assert min(orders, key=lambda order: orders[order]) == wanted
    flops, y = count_flops(lambda: model(x))
    assert flops - 2 * tokens * m * n == tokens * orders[wanted]
    # both orders are the same map
    X = x.reshape(tokens, n1, n2)
    first_d = torch.einsum("ac,tcb->tab", C, X @ D.t()).reshape(tokens, m)
    first_c = (torch.einsum("ac,tcd->tad", C, X) @ D.t()).reshape(tokens, m)
    close(first_d, first_c, 1e-12)
    close(y, F.linear(x, W, model.layer.bias) + ALPHA / rank * first_d, 1e-12)


def test_full_scale():
    for full_scale, scale in (("alpha_over_r", 0.01), ("one", 1.0)):
        _, handle, p = adapted(lokr(rank=100, alpha=1.0, full_scale=full_scale), linear(M, N))
        fill(handle)
        close(handle.update_of("layer").dense(), kronecker(*factors(p.roles()), scale), 1e-12)
    # only where both factors are full: D is not, or C is not
    for options in ({}, {"decompose_both": True, "factor": 16}):
        _, handle, p = adapted(lokr(rank=2, alpha=1.0, full_scale="one", **options), linear(M, N))
        assert ("C" in p.roles(), "D" in p.roles()) == ((False, True) if options else (True, False))
        fill(handle)
        close(handle.update_of("layer").dense(), kronecker(*factors(p.roles()), 0.5), 1e-12)


@pytest.mark.parametrize(
    ("rank", "both", "roles"),
    [
        (3, False, {"C", "D_B", "D_A"}),  # D is full from r = max(8, 8) / 2 on
        (4, False, {"C", "D"}),
        (2, True, {"C_B", "C_A", "D_B", "D_A"}),  # C is decomposed below r = max(6, 4) / 2
        (3, True, {"C", "D_B", "D_A"}),
    ],
)
def test_which_factors_are_full(rank, both, roles):
    assert set(adapted(lokr(rank=rank, decompose_both=both), linear(M, N))[2].roles()) == roles


def test_merging():
    x = randn(9, N, seed=1)
    model, handle, _, W = generic()
    before = model(x).detach()
    handle.merge_()
    close(F.linear(x, model.layer.weight, model.layer.bias), before, 1e-12)
    handle.unmerge_()
    assert torch.equal(model.layer.weight, W)
