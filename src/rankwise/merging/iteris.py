"""IterIS: one update that makes the merged layer answer as each source layer did, on the inputs the merged model really sees.

Per site and task i: D_i = s_i B_i A_i (m, n) is adapter i's update, X_i (n, T_i) the layer's inputs when the model with
adapter i reads samples of task i, X̃_i (n, T_i) its inputs when the model merged so far reads the same samples. Then

    D* = argmin_D Σ_i λ_i ‖D_i X_i - D X̃_i‖²_F  =  R M⁻¹,   R = Σ_i λ_i D_i G_i,   M = Σ_i λ_i C_i
    G_i = X_i X̃_iᵀ + α ‖X_i X̃_iᵀ‖_F I,   C_i = X̃_i X̃_iᵀ + α ‖X̃_i X̃_iᵀ‖_F I                     (n, n), float64
    λ_i = c_i ‖F_i‖²_F / ‖F_i X_i‖²_F,   F_i = W + D_i ("full"), D_i ("delta"), or λ_i = c_i ("none"), once, from X_i

It starts with X̃_i = X_i. All sites are solved from features of the same pass, D* is applied on top of the untouched W, new
X̃_i are measured, and so on; a return follows a solve. Nothing is trained, no label is read. In a chain of L layers the solution
of layer l is final from solve l on. Every D_i G_i has its columns in span(B_i), so the result is exactly a plain LoRA:

    B' = [B_1 … B_N] (m, Σr),   A' = [λ_i s_i A_i G_i M⁻¹]_i (Σr, n)

Not RegMean, of which it is the iteration (equal to it on the updates at max_iterations=1, α=0, weight="none").

*Differs* from the release: padded tokens are dropped (mask=False keeps them); batches are replayed and only (n, n) sums kept,
instead of features; the option to solve for the full weight is left out, the regression of the update being the paper's;
features are those of one forward per batch, not of the last step of a generation.

Chen et al.: IterIS: Iterative Inference-Solving Alignment for LoRA Merging, 2025, arXiv:2411.15231.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.core.errors import ArgumentError, MergeError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.core.statistics import MomentCollector
from rankwise.merging.adapters import Adapter, MergeResult, aligned, result_of
from rankwise.merging.exact import svd
from rankwise.merging.features import moments, replayable, sites_of
from rankwise.merging.operands import as_double, checked_weights

Side = dict[str, list[Tensor]]  # site -> right sides: one (r_i, n) per adapter, or one (m, n) where an update is dense


@torch.no_grad()
def iteris(
    model: nn.Module,
    adapters: Sequence[Adapter],
    batches: Sequence[Iterable[Any]],
    weights: Sequence[float] | None = None,
    *,
    alpha: float = 1e-7,
    max_iterations: int = 10,
    weight: str = "full",
    blend: float = 0.0,
    mask: bool = True,
    rank: int | None = None,
) -> MergeResult:
    """Merges adapters of one base by the inputs they see. The model is left as it was.

    Args:
        model: the base; adapters on it are switched off for the while.
        adapters: one mapping site -> update per task.
        batches: one list of batches per task (about 50 samples each), gone through once per iteration.
        weights: c_i; None means 1 for each.
        alpha: α. Too small for few tokens makes M singular, too large turns the result into an average.
        max_iterations: number of solves; at least the depth in adapted layers. It ends early when nothing moves any more.
        weight: "full", "delta" or "none": what λ_i is balanced by.
        blend: ρ in X̃ <- (1 - ρ) X̃ + ρ X.
        mask: drop padded tokens, as attention_mask tells.
        rank: cut every site down to this rank by its singular values; None keeps Σ r_i, exact.

    Raises:
        MergeError: M is singular, a site is missing, or a weight of the model is not the untouched one.
    """
    table = aligned(adapters)
    balance = checked_weights(next(iter(table.values())), weights)
    if weight not in ("full", "delta", "none") or max_iterations < 1 or alpha < 0 or not 0 <= blend <= 1:
        raise ArgumentError(
            f"weight is full, delta or none, max_iterations >= 1, alpha >= 0 and blend in [0, 1]; got {weight!r}, "
            f"{max_iterations}, {alpha}, {blend}"
        )
    if len(batches) != len(adapters):
        raise ArgumentError(f"{len(adapters)} adapters need as many lists of batches, one per task; got {len(batches)}")
    targets = sites_of(model, table)
    updates = {site: [as_double(update) for update in row] for site, row in table.items()}
    factors: dict[str, float] = {}  # "site/task" -> λ_i
    merged: dict[str, Operator] | None = None
    right: Side = {}
    changes: list[float] = []
    for _ in range(max_iterations):
        left, new = {}, {site: [] for site in table}
        for task, part in enumerate(batches):
            source = {site: row[task] for site, row in updates.items()}
            seen = moments(model, targets, replayable(part, f"batches[{task}]"), source, merged, blend=blend, mask=mask)
            for site, D in source.items():
                if merged is None:
                    base = targets[site].matrix().detach().to("cpu", torch.float64) if weight == "full" else None
                    factors[f"{site}/{task}"] = balance[task] * _balance(D, base, seen[site].gram, weight)
                C, DG = _regularized(D, seen[site], alpha)
                scale = factors[f"{site}/{task}"]
                left[site] = left[site] + scale * C if task else scale * C  # (n, n)
                new[site].append(scale * DG)
        solved = {site: _solve(site, left[site], new[site], updates[site]) for site in table}
        changes.append(_change(right, solved))
        right, merged = solved, {site: _operator(updates[site], solved[site]) for site in table}
        if changes[-1] == 0.0:
            break
    operators = {site: _finish(merged, site, table[site], rank) for site in table}  # type: ignore[arg-type]
    facts = {"iterations": len(changes), "relative change per solve": [float(f"{change:.3g}") for change in changes]}
    return result_of("iteris", adapters, operators, balance, facts)


def _balance(D: Operator, base: Tensor | None, gram: Tensor, weight: str) -> float:
    """‖F‖²_F / ‖F X‖²_F. For F = 0 (an adapter without this site) its mean over all F of one size, n / ‖X‖²_F."""
    if weight == "none":
        return 1.0
    F = D.dense() if base is None else base + D.dense()  # (m, n)
    size, seen = float(F.square().sum()), float(((F @ gram) * F).sum())
    if size == 0.0:
        size, seen = float(gram.shape[0]), float(gram.trace())
    if seen <= 0.0:
        raise MergeError("a task's inputs of some layer are all zero where its weight acts; give it other samples")
    return size / seen


def _regularized(D: Operator, seen: MomentCollector, alpha: float) -> tuple[Tensor, Tensor]:
    """C_i (n, n), and A_i G_i (r_i, n) or, for a dense update, D_i G_i (m, n)."""
    C, G = seen.gram, seen.cross.t()  # type: ignore[union-attr]
    eye = torch.eye(C.shape[0], dtype=C.dtype)
    G = G + (alpha * G.norm()) * eye
    left = D.A if isinstance(D, LowRank) else D.dense()
    return C + (alpha * C.norm()) * eye, left.to(G.device) @ G


def _solve(site: str, M: Tensor, parts: list[Tensor], updates: list[Operator]) -> list[Tensor]:
    """The right sides times M⁻¹; M (n, n) is symmetric, positive definite where there is enough data."""
    L, failed = torch.linalg.cholesky_ex((M + M.t()) / 2)
    pivots = L.diagonal().square()
    if int(failed) or not float(pivots.min()) > M.shape[0] * torch.finfo(M.dtype).eps * float(pivots.max()):
        raise MergeError(
            f"{site}: the {M.shape[0]} × {M.shape[0]} Gram matrix of its inputs is singular; give more samples (more tokens than "
            "inputs), or a larger alpha"
        )
    if not all(isinstance(update, LowRank) for update in updates):
        parts = [torch.stack([_dense(D, part) for D, part in zip(updates, parts, strict=True)]).sum(0)]
    return [torch.cholesky_solve(part.t(), L).t() for part in parts]


def _dense(D: Operator, part: Tensor) -> Tensor:
    return D.B @ part if isinstance(D, LowRank) else part


def _operator(updates: list[Operator], solved: list[Tensor]) -> Operator:
    """D* from the solved right sides: exact factors, or a dense matrix."""
    pairs = [update for update in updates if isinstance(update, LowRank)]
    if len(pairs) < len(updates):
        return Dense(solved[0])
    return LowRank(torch.cat([pair.B for pair in pairs], dim=1), torch.cat(solved, dim=0))


def _change(old: Side, new: Side) -> float:
    """The largest relative change of a site's right sides; 1 at the first solve."""
    if not old:
        return 1.0
    pairs = [(torch.cat(old[site]), torch.cat(new[site])) for site in new]
    return max(float((b - a).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)) for a, b in pairs)


def _finish(merged: Mapping[str, Operator], site: str, updates: Sequence[Operator], rank: int | None) -> Operator:
    """D* of one site in the dtype of its updates, cut to `rank`."""
    operator = merged[site] if rank is None else svd([merged[site]], rank=rank)
    pairs = [as_low_rank(update) for update in updates]
    common = torch.float32
    for update, pair in zip(updates, pairs, strict=True):
        common = torch.promote_types(common, update.dense().dtype if pair is None else pair.B.dtype)
    if isinstance(operator, LowRank):
        return LowRank(operator.B.to(common), operator.A.to(common))
    return Dense(operator.dense().to(common))
