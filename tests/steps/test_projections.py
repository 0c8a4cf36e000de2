"""Fira, APOLLO, COAP, online subspace descent and GaLore+: what their papers claim of the one projector."""

import itertools

import pytest
import torch

import rankwise
from rankwise.core.errors import ArgumentError
from rankwise.core.optimizer import BlockOptimizer
from rankwise.core.piece import piece
from rankwise.steps.apollo import apollo
from rankwise.steps.bases import randomized_basis, svd_basis
from rankwise.steps.coap import coap, objective, objective_gradient, sketched_basis
from rankwise.steps.fira import fira
from rankwise.steps.galore import galore
from rankwise.steps.galore_plus import galore_plus
from rankwise.steps.growth import growth_limiter
from rankwise.steps.moments import adamw, sgd
from rankwise.steps.online_subspace import online_subspace_descent, pca_gradient
from tests.steps.stepping import draws, moves, numbers, run

SHAPES = [(5, 8), (8, 5), (6, 6)]
EVERY = [fira, apollo, coap, online_subspace_descent, galore_plus]


def close(one, two, tolerance=1e-9):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


# --- all of them


@pytest.mark.parametrize("make", [fira, coap, online_subspace_descent, galore_plus])
def test_a_transposed_problem_gives_the_transposed_weight(make):
    """APOLLO cannot: its random numbers fill P (m, r) and Q (r, n) in another order."""
    W, *gradients = draws(5, 8, 7)
    options = {"density": 0.0} if make is galore_plus else {}
    one, _ = run([make(rank=2, **options)], W, gradients)
    two, _ = run([make(rank=2, **options)], W.mT.contiguous(), [g.mT.contiguous() for g in gradients])
    close(one[-1], two[-1].mT)


@pytest.mark.parametrize("make", EVERY)
def test_weight_decay_acts_on_the_whole_weight(make):
    W, gradient = draws(5, 8, 2)
    (plain,), _ = run([make(rank=2)], W, [gradient])
    (decayed,), _ = run([make(rank=2, weight_decay=0.3)], W, [gradient])
    close(decayed, plain - 0.1 * 0.3 * W)


@pytest.mark.parametrize("make", EVERY)
def test_state_of_a_half_precision_weight_is_single(make):
    W, *gradients = draws(6, 9, 4, dtype=torch.bfloat16)
    path, state = run([make(rank=2)], W, gradients)
    assert path[-1].dtype == torch.bfloat16 and torch.isfinite(path[-1]).all()
    assert all(value.dtype != torch.bfloat16 for value in state.values())


@pytest.mark.parametrize("make", EVERY)
def test_a_first_gradient_of_zero_holds_nothing_back(make):
    W, *gradients = draws(6, 9, 5)
    path, _ = run([make(rank=2)], W, [torch.zeros_like(W), *gradients[:4]])
    assert torch.isfinite(path[-1]).all()
    if make is not online_subspace_descent:
        assert float((path[1] - path[0]).norm()) > 1e-3


@pytest.mark.parametrize("make", EVERY)
def test_unfit_inner_steps_and_ranks_are_refused(make):
    with pytest.raises(ArgumentError, match="give weight_decay to"):
        make(inner=piece(adamw, weight_decay=0.1))
    with pytest.raises(ArgumentError, match="inner is a step that makes the update"):
        make(inner=piece(galore))
    W, gradient = draws(3, 8, 2)
    with pytest.raises(ArgumentError, match=r"rank=4 is larger than a weight of 3 × 8"):
        run([make(rank=4)], W, [gradient])


# --- Fira


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_with_sgd_is_sgd(shape):
    W, *gradients = draws(*shape, 6)
    mine, _ = run([fira(rank=2, scale=1.0, refresh=2, limit=None, inner=piece(sgd))], W, gradients)
    theirs, _ = run([sgd()], W, gradients)
    close(mine[-1], theirs[-1], 1e-7)  # φ = ‖R‖/(‖R‖ + 1e-8)


def test_fira_at_full_rank_is_galore():
    W, *gradients = draws(5, 8, 6)
    for mode in ("code", "clean"):
        mine, _ = run([fira(rank=5, scale=1.0, refresh=2, alpha_mode=mode)], W, gradients)
        close(mine[-1], run([galore(rank=5, scale=1.0, refresh=2)], W, gradients)[0][-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["code", "clean"])
def test_fira_first_step_by_hand(shape, mode):
    W, G = draws(*shape, 2)
    (path,), state = run([fira(rank=2, scale=0.25, alpha_mode=mode, inner=piece(adamw, eps=0.0))], W, [G])
    left = shape[0] < shape[1]
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    base = U[:, :2] if left else Vh[:2].mT
    R = base.mT @ G if left else G @ base
    N = R.sign()
    up = (lambda x: base @ x) if left else (lambda x: x @ base.mT)
    E = G - (0.25 if mode == "code" else 1.0) * up(R)
    S = E * (2**0.5 / R.norm(dim=0 if left else 1, keepdim=True))
    close((W - path) / 0.1, 0.25 * up(N) + S, 1e-6)
    close(state["fira.residual_norm"], S.norm(), 1e-6)


def test_the_limiter_holds_growth_and_keeps_the_limited_norm():
    limiter, kept = growth_limiter(1.5), {}
    S = torch.eye(2, dtype=torch.float64)
    norms = [float(limiter(S * size, kept).norm() / S.norm()) for size in (1.0, 4.0, 4.0, 2.0, 0.5, 0.0, 3.0)]
    close(torch.tensor(norms), torch.tensor([1.0, 1.5, 2.25, 2.0, 0.5, 0.0, 3.0]))
    with pytest.raises(ArgumentError, match="at least 1"):
        growth_limiter(0.9)


def test_fira_and_apollo_are_limited_at_every_step():
    W, *gradients = draws(6, 9, 12)
    growing = [gradient * (1 + index) ** 2 for index, gradient in enumerate(gradients)]
    for make, options in ((fira, {"alpha_mode": "clean"}), (apollo, {})):
        path, _ = run([make(rank=2, refresh=5, inner=piece(sgd), **options)], W, growing)
        free, _ = run([make(rank=2, refresh=5, inner=piece(sgd), limit=None, **options)], W, growing)
        assert not torch.allclose(path[-1], free[-1])
        if make is apollo:
            norms = [float(move.norm()) for move in moves(path, W)]
            assert all(after <= 1.01 * before * (1 + 1e-9) for before, after in itertools.pairwise(norms))
    same = [gradients[0] / (1 + index) for index in range(6)]  # a decreasing sequence is never changed
    limited, _ = run([fira(rank=2, inner=piece(sgd))], W, same)
    close(limited[-1], run([fira(rank=2, inner=piece(sgd), limit=float("inf"))], W, same)[0][-1])


def test_fira_matrix_and_column_agree_where_all_columns_are_alike():
    W = draws(4, 8, 1)[0]
    G = torch.linalg.qr(draws(8, 8, 1)[0]).Q[:4] * torch.tensor([[4.0], [3.0], [2.0], [1.0]], dtype=torch.float64)
    G = torch.cat([G[:2, :4], G[2:, 4:].flip(0)], dim=0).repeat(1, 2)  # nothing special, one draw
    column, _ = run([fira(rank=4, inner=piece(sgd))], W, [G])
    matrix, _ = run([fira(rank=4, inner=piece(sgd), scaling="matrix")], W, [G])
    close(column[-1], matrix[-1], 1e-6)


def test_state_sizes():
    W, *gradients = draws(6, 9, 3)
    for step, size in (
        (fira(rank=2), 6 * 2 + 2 * 9 * 2),
        (apollo(rank=2), 2 * 9 * 2),
        (apollo(rank=1, granularity="tensor"), 2 * 9),
        (apollo(rank=2, basis="svd"), 6 * 2 + 2 * 9 * 2),
        (coap(rank=2), 6 * 2 + 2 * 9 * 2),
        (online_subspace_descent(rank=2), 6 * 2 + 2 * 9 * 2 + 2 * 6 * 2),
        (online_subspace_descent(rank=2, projector="sgd"), 6 * 2 + 2 * 9 * 2),
        (galore_plus(rank=2, density=0.1, warmup=1), 6 * 2 + 2 * 9 * 2 + 3 * 5),
        (galore_plus(rank=2, density=0.1), 6 * 2 + 2 * 9 * 2 + 6 * 9),  # in its warm-up
        (galore_plus(rank=2, density=0.0), 6 * 2 + 2 * 9 * 2),
    ):
        assert numbers(run([step], W, gradients)[1]) == size, step.name


# --- APOLLO


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_apollo_moves_every_channel_along_its_own_gradient(shape, granularity):
    W, *gradients = draws(*shape, 6)
    path, _ = run([apollo(rank=2, refresh=2, granularity=granularity)], W, gradients)
    dim = 0 if shape[0] < shape[1] else 1
    for move, G in zip(moves(path, W), gradients, strict=True):
        cosines = torch.nn.functional.cosine_similarity(move, G, dim=dim)
        close(cosines, torch.ones_like(cosines), 1e-6)
        if granularity == "tensor":
            close(move / move.norm(), G / G.norm(), 1e-6)


def test_apollo_with_sgd_is_sgd_and_scale_enters_as_a_root():
    W, *gradients = draws(5, 8, 6)
    options = {"rank": 2, "refresh": 2, "limit": None, "inner": piece(sgd)}
    theirs, _ = run([sgd()], W, gradients)
    close(run([apollo(**options)], W, gradients)[0][-1], theirs[-1], 1e-7)
    close(run([apollo(scale=4.0, **options)], W, gradients)[0][-1] - W, 2 * (theirs[-1] - W), 1e-7)


def test_apollo_does_not_see_the_scale_of_the_gradient():
    W, *gradients = draws(5, 8, 6)
    step = apollo(rank=2, refresh=2, inner=piece(adamw, eps=0.0))
    one, _ = run([step], W, gradients)
    two, _ = run([step], W, [1000.0 * gradient for gradient in gradients])
    close(one[-1], two[-1], 1e-7)  # but for the 1e-8 beside ‖R‖


def test_apollo_first_step_on_an_orthonormal_basis():
    W, G = draws(4, 7, 2)
    (path,), _ = run([apollo(rank=4, basis="svd", inner=piece(adamw, eps=0.0))], W, [G])
    norms = ((W - path) / 0.1).norm(dim=0)
    close(norms, torch.full((7,), 2.0, dtype=torch.float64), 1e-6)


def test_apollo_draws_its_projection_anew_per_window_and_layer_and_keeps_none():
    W, *gradients = draws(6, 9, 5)
    step = apollo(rank=2, refresh=2, limit=None)
    path, state = run([step], W, gradients)
    assert not any(value.shape in ((6, 2), (2, 6)) for value in state.values())
    other, _ = run([step], W, gradients, site="another")
    assert not torch.allclose(path[0], other[0])
    longer, _ = run([apollo(rank=2, refresh=3, limit=None)], W, gradients)
    assert torch.equal(path[1], longer[1]) and not torch.allclose(path[2], longer[2])


def test_scale_front_decides_which_norm_is_kept_and_no_weight():
    W, *gradients = draws(6, 9, 6)
    front, kept_front = run([apollo(rank=2, scale=9.0, scale_front=True)], W, gradients)
    back, kept_back = run([apollo(rank=2, scale=9.0)], W, gradients)
    close(front[-1], back[-1])
    close(kept_front["apollo.residual_norm"], 3.0 * kept_back["apollo.residual_norm"])


# --- COAP


def test_coap_gradient_is_the_one_of_its_objective():
    G, M, Q = draws(6, 5, 1)[0], draws(6, 2, 1, seed=1)[0], draws(2, 5, 1, seed=2)[0].requires_grad_()
    (slope,) = torch.autograd.grad(objective(Q, G, M), Q)
    close(objective_gradient(Q.detach(), G, M), slope, 1e-10)
    assert torch.autograd.gradcheck(lambda q: objective(q, G, M), (Q,), atol=1e-8)
    G[2], M[3] = 0.0, 0.0  # rows without gradient or momentum have no angle
    (slope,) = torch.autograd.grad(objective(Q, G, M), Q)
    close(objective_gradient(Q.detach(), G, M), slope, 1e-6)


def test_coap_small_steps_lower_the_objective():
    for seed in range(100):
        G, M, Q = (draws(*shape, 1, seed=seed)[0] for shape in ((6, 5), (6, 2), (2, 5)))
        slope = objective_gradient(Q, G, M)
        step = 1e-3 * slope * min(1.0, 1.0 / float(slope.norm()))
        assert float(step.norm()) <= 1e-3 * (1 + 1e-12)
        assert float(objective(Q - step, G, M)) < float(objective(Q, G, M))


def test_coap_recomputation_is_exact_on_low_rank_and_keeps_an_optimal_basis():
    left, right, G = draws(9, 3, 1)[0], draws(3, 7, 1)[0], draws(9, 7, 1)[0]
    low = left @ right
    for previous in (None, draws(3, 7, 1, seed=4)[0]):
        Q = sketched_basis(low, previous, 3, torch.Generator().manual_seed(0))
        close(low @ Q.mT @ Q, low)
    best = svd_basis(G, 3, "right", {}).Q
    again = sketched_basis(G, best, 3)
    close(again.mT @ again, best.mT @ best)


@pytest.mark.parametrize("shape", SHAPES)
def test_coap_always_recomputed_at_full_rank_is_galore(shape):
    W, *gradients = draws(*shape, 6)
    full = min(shape)
    mine, _ = run([coap(rank=full, refresh=2, recompute=1)], W, gradients)
    close(mine[-1], run([galore(rank=full, scale=1.0, refresh=2)], W, gradients)[0][-1])


def test_coap_schedule():
    W, *gradients = draws(5, 8, 14)
    weight = torch.nn.Parameter(W.clone())
    optimizer = BlockOptimizer({"site": {"weight": weight}}, [coap(rank=2, refresh=2, recompute=3)], 0.1)
    before, changed, orthonormal = None, [], []
    for index, gradient in enumerate(gradients):
        weight.grad = gradient.clone()
        optimizer.step()
        P = optimizer.state[weight]["coap.P"].clone()
        if before is None or not torch.equal(P, before):
            changed.append(index)
            if torch.allclose(P.mT @ P, torch.eye(2, dtype=torch.float64), atol=1e-9):
                orthonormal.append(index)
        before = P
    assert changed == [0, 2, 4, 6, 8, 10, 12] and orthonormal == [0, 6, 12]


def test_coap_restores_moments_through_a_change_of_basis():
    W, *gradients = draws(8, 5, 5)
    _, before = run([coap(rank=2, refresh=2, recompute=1, restore=True)], W, gradients[:2])
    old, M, V = (before[f"coap.{name}"].clone() for name in ("Q", "inner.exp_avg", "inner.exp_avg_sq"))
    _, after = run([coap(rank=2, refresh=2, recompute=1, restore=True)], W, gradients[:3])
    new = after["coap.Q"]
    G = gradients[2] @ new.mT
    close(after["coap.inner.exp_avg"], 0.9 * (M @ old @ new.mT) + 0.1 * G)
    close(after["coap.inner.exp_avg_sq"], 0.999 * (V.sqrt() @ old @ new.mT).square() + 0.001 * G.square())


# --- online subspace descent


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_online_gradient_is_the_one_of_its_loss(penalty):
    G, P = draws(6, 9, 1)[0], draws(6, 2, 1, seed=1)[0].requires_grad_()

    def loss(P):
        unit = G / G.norm()
        eye = torch.eye(2, dtype=torch.float64)
        return (unit - P @ P.mT @ unit).square().sum() + penalty * (P.mT @ P - eye).square().sum()

    (slope,) = torch.autograd.grad(loss(P), P)
    close(pca_gradient(P.detach(), G, penalty), slope, 1e-10)
    close(pca_gradient(P.detach(), 1e6 * G, penalty), slope, 1e-10)
    best = svd_basis(G, 2, "left", {}).P
    assert float(pca_gradient(best, G, penalty).abs().max()) < 1e-12


def test_online_basis_becomes_the_leading_subspace():
    first, G = draws(12, 15, 2)
    W = torch.zeros(12, 15, dtype=torch.float64)
    step = online_subspace_descent(rank=3, projector="sgd", rate=0.5)
    _, state = run([step], W, [first, *[G] * 4000], lr=0.0)
    P, best = state["online_subspace_descent.P"], svd_basis(G, 3, "left", {}).P
    close(P.mT @ P, torch.eye(3, dtype=torch.float64), 1e-9)
    close(P @ P.mT, best @ best.mT, 1e-6)


def test_online_without_a_rate_is_galore_that_never_refreshes():
    W, *gradients = draws(5, 8, 8)
    mine, _ = run([online_subspace_descent(rank=2, rate=0.0)], W, gradients)
    close(mine[-1], run([galore(rank=2, refresh=1000)], W, gradients)[0][-1])


def test_online_projects_down_and_back_with_the_old_basis():
    W = torch.zeros(2, 3, dtype=torch.float64)
    one, two = torch.zeros_like(W), torch.zeros_like(W)
    one[0, 0] = two[1, 0] = 1.0
    step = online_subspace_descent(rank=1, scale=1.0, projector="sgd", rate=0.5, inner=piece(sgd))
    mixed = one + 0.5 * two
    path, _ = run([step], W, [one, mixed, mixed])
    first, second, third = moves(path, W)
    close(first, one)
    close(second, one)  # e1 still
    assert float(third[1].abs().max()) > 0.01


def test_online_rate_follows_the_schedule():
    W, *gradients = draws(5, 8, 4)

    def bases(rate, factor):
        weight = torch.nn.Parameter(W.clone())
        optimizer = BlockOptimizer(
            {"s": {"weight": weight}}, [online_subspace_descent(rank=2, projector="sgd", rate=rate)], 0.1
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
            scheduler.step()
        return optimizer.state[weight]["online_subspace_descent.P"]

    close(bases(0.4, 0.5), bases(0.2, 1.0))


# --- GaLore+


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_randomized_basis_is_nearly_optimal(side):
    m, n, r = 60, 80, 8
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
        V = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        values = 0.8 ** torch.arange(m, dtype=torch.float64)
        G = (U * values) @ V[:m]
        projection = randomized_basis(G, r, side, iterations=2, oversampling=8, generator=generator)
        lost = G - projection.up(projection.down(G))
        assert float(lost.norm()) <= 1.001 * float(values[r:].norm())


def test_galore_plus_without_heads_and_places_is_galore():
    W, *gradients = draws(6, 9, 6)
    options = {"rank": 2, "refresh": 2}
    mine, _ = run([galore_plus(density=0.0, iterations=30, **options)], W, gradients)
    close(mine[-1], run([galore(**options)], W, gradients)[0][-1], 1e-6)


def test_one_head_serves_all_that_share_its_inputs():
    W, shared = draws(8, 10, 1)[0], draws(2, 10, 1)[0]
    gradients = [torch.cat([part @ shared for part in draws(2, 2, 4, seed=seed)]) for seed in range(4)]
    step = galore_plus(rank=2, scale=1.0, refresh=1, heads=4, head_layers=("q_proj",), density=0.0, inner=piece(sgd))
    path, state = run([step], W, gradients, site="layers.0.q_proj")
    close(path[-1], run([sgd()], W, gradients)[0][-1])  # nothing is lost
    assert state["galore_plus.Q"].shape == (2, 10)
    _, other = run([step], W, gradients, site="layers.0.o_proj")
    assert other["galore_plus.P"].shape == (8, 2)


@pytest.mark.parametrize("inner", [piece(sgd, momentum=0.9), piece(adamw)])
def test_density_one_is_the_inner_step_on_everything(inner):
    W, *gradients = draws(6, 9, 6)
    mine, _ = run([galore_plus(rank=2, scale=1.0, refresh=2, density=1.0, inner=inner)], W, gradients)
    whole, _ = run([inner.build()], W, gradients)
    for one, two in zip(moves(mine, W), moves(whole, W), strict=True):
        size = one.norm() / two.norm()  # Adam's in the size of what a subspace gives
        close(one, size * two)
        assert inner.name != "sgd" or float(size) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_places_are_those_that_lose_most_and_the_rest_is_galore(warmup):
    W, *gradients = draws(6, 9, 6)
    options = {"rank": 2, "refresh": 100, "inner": piece(sgd, momentum=0.9)}
    path, state = run([galore_plus(density=0.2, warmup=warmup, **options)], W, gradients)
    plain, _ = run([galore_plus(density=0.0, **options)], W, gradients)
    places = state["galore_plus.places"]
    assert places.dtype == torch.int32 and len(places) == round(0.2 * 54) and state["galore_plus.lost"].numel() == 0
    Q = svd_basis(gradients[0], 2, "left", {}).P
    lost = sum((G - Q @ (Q.mT @ G)).abs() for G in gradients[: max(warmup, 1)]).reshape(-1)
    assert set(places.tolist()) == set(lost.topk(11).indices.tolist())
    for index, (one, two) in enumerate(zip(moves(path, W), moves(plain, W), strict=True)):
        differ = ((one - two).abs().reshape(-1) > 1e-9).nonzero().reshape(-1)
        assert set(differ.tolist()) <= set(places.tolist()) and bool(len(differ)) == (index >= warmup)


def test_galore_plus_refuses_heads_that_do_not_fit():
    W, gradient = draws(6, 9, 2)
    for heads, rank in ((4, 1), (3, 3)):
        with pytest.raises(ArgumentError, match=f"heads={heads} parts of at least rank={rank}"):
            run([galore_plus(rank=rank, heads=heads)], W, [gradient])
    with pytest.raises(ArgumentError, match="head_layers has no effect"):
        galore_plus(head_layers=("q_proj",))


def test_a_layer_named_in_head_layers_must_be_there():
    handle = rankwise.adapt_(torch.nn.Sequential(torch.nn.Linear(8, 8)), galore_plus_recipe(("query",)))
    with pytest.raises(ArgumentError, match="names the layer 'query', which is not adapted"):
        handle.optimizer(lr=0.1)


def galore_plus_recipe(layers):
    return rankwise.catalog.galore_plus(rank=2, heads=2, head_layers=layers)
