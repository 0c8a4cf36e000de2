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

from rankwise.core.errors import ArgumentError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.queries import as_low_rank
from rankwise.merging.adapters import Adapter, MergeResult, aligned, result_of
from rankwise.merging.exact import svd
from rankwise.merging.features import moments, replayable, sites_of
from rankwise.merging.operands import as_double, checked_weights
from rankwise.merging.regression import balance, regularized, solution, solve

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
    user = checked_weights(next(iter(table.values())), weights)
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
                    factors[f"{site}/{task}"] = user[task] * balance(D, base, seen[site].gram, weight)
                C, DG = regularized(D, seen[site], alpha)
                scale = factors[f"{site}/{task}"]
                left[site] = left[site] + scale * C if task else scale * C  # (n, n)
                new[site].append(scale * DG)
        solved = {site: solve(site, left[site], new[site], updates[site]) for site in table}
        changes.append(_change(right, solved))
        right, merged = solved, {site: solution(updates[site], solved[site]) for site in table}
        if changes[-1] == 0.0:
            break
    operators = {site: _finish(merged, site, table[site], rank) for site in table}  # type: ignore[arg-type]
    facts = {"iterations": len(changes), "relative change per solve": [float(f"{change:.3g}") for change in changes]}
    return result_of("iteris", adapters, operators, user, facts)


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
