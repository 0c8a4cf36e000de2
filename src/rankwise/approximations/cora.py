"""CoRA: the output factor is the common subspace of earlier fine-tunes of the same base.

    M = [M₁ … M_N] (m, N n) = U S Vᵀ          C = U_r (m, r)          B = g C          A = 0 (r, n), trained

M_i is what source i did to the layer. C Cᵀ is the projector that loses least of them, Σ_i ‖M_i − C Cᵀ M_i‖² = Σ_{k>r} S_k². The
update is zero, so the first forward equals the base to the bit. Frozen, B is shared by every task of the base and a task costs
r·n numbers; with `freeze=False` B is a start and trains too. Sources of low rank are decomposed by their factors (QR of all B_i
and a small core, in O(m (Σ r_i)²)), others through Σ M_i M_iᵀ (m, m). `captured` tells the share of S² that C holds: where it
is small there is no common subspace. `source="weight"` takes whole weights W + M_i, which brings the base's own directions
back; `share` joins layers of one kind (the last part of their name) or all, of equal m, so that they get one C.

Of one source of rank r, C holds everything: A = Cᵀ M₁ / (s g) gives it back.

*Differs*: the paper does not say whether it stacks weights or differences, nor whether the projections q, k, v are taken
together; differences per layer are the default here, the rest are options. Decided from abstract and summaries; low confidence.

Xiao, Shen, Bao, Rong, Liu, Wang, Liu: CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models, 2024,
arXiv:2409.02119.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.approximations.starting import check_choice
from rankwise.approximations.truncated_svd import check_rank, column_signs
from rankwise.core.errors import ArgumentError, StatisticsError
from rankwise.core.operators import Dense, LowRank, Operator
from rankwise.core.parameterization import FROZEN_OUTPUT, OUTPUT
from rankwise.core.piece import register
from rankwise.core.queries import as_low_rank
from rankwise.core.statistics import LayerStatistics, Statistic
from rankwise.core.stored import StoredAdapter, read_stored, weight_hashes


def common_subspace(updates: Sequence[Operator]) -> tuple[Tensor, Tensor]:
    """U (m, k), orthonormal, and S (k,) descending of the updates (m, n_i) side by side, in float64."""
    pairs = [as_low_rank(update) for update in updates]
    exact = [pair.folded() for pair in pairs if pair is not None]
    if len(exact) == len(pairs) and sum(pair.rank for pair in exact) < updates[0].shape[0]:
        Q, R = torch.linalg.qr(torch.cat([pair.B.double() for pair in exact], dim=1))  # (m, k), (k, k)
        parts = R.split([pair.rank for pair in exact], dim=1)
        cores = [part @ torch.linalg.qr(pair.A.double().t())[1].t() for part, pair in zip(parts, exact, strict=True)]
        u, S, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
        return Q @ u, S
    matrices = [update.dense().double() for update in updates]
    gram = torch.stack([matrix @ matrix.t() for matrix in matrices]).sum(0)  # (m, m)
    values, vectors = torch.linalg.eigh(gram)
    noise = torch.finfo(values.dtype).eps * values.numel() * values[-1]
    return vectors.flip(1), torch.where(values > noise, values, torch.zeros_like(values)).flip(0).sqrt()


@register("start")
class CoRA:
    """B = g C with C the common output directions of earlier adapters, A = 0.

    Args:
        sources: folders of adapters on this base, as `handle.save` wrote them; `rankwise.interop.from_peft` brings PEFT's here.
        gain: g.
        freeze: whether B has to stay as it starts.
        source: "delta", what each adapter changed, or "weight", the changed weight.
        share: one C "per_site", "per_kind" of layer, or "global".
    """

    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT})
    shifted: bool = False
    mode: str = "none"

    def __init__(
        self,
        *,
        sources: Sequence[str],
        gain: float = 1.0,
        freeze: bool = True,
        source: str = "delta",
        share: str = "per_site",
    ) -> None:
        if isinstance(sources, str) or not sources:
            raise ArgumentError(f"sources is a list of folders of earlier adapters, not {sources!r}")
        if gain == 0:
            raise ArgumentError("gain is the size of B; with 0 nothing would ever train")
        self.sources, self.gain = tuple(str(folder) for folder in sources), gain
        self.source = check_choice("source", source, ("delta", "weight"))
        self.share = check_choice("share", share, ("per_site", "per_kind", "global"))
        if source == "weight" and share != "per_site":
            raise ArgumentError(f"share={share!r} joins what was changed in several layers; it goes with source='delta'")
        self.kind = FROZEN_OUTPUT if freeze else OUTPUT
        self._read: list[StoredAdapter] = []

    def __call__(self, statistics: LayerStatistics, rank: int, *, generator: torch.Generator, scale: float = 1.0) -> LowRank:
        """Factors (B, 0), BᵀB = g² I.

        Raises:
            StatisticsError: the sources together change fewer than r directions.
            FingerprintError: a source was trained on another base.
        """
        W = statistics.weight  # (m, n)
        check_rank(rank, *W.shape)
        U, S = common_subspace(self.updates(statistics))
        alive = int((S[0] * torch.finfo(S.dtype).eps * max(W.shape) < S).sum())
        if alive < rank:
            raise StatisticsError(
                f"{statistics.site}: the {len(self.sources)} sources together change {alive} directions of this layer, fewer "
                f"than the rank {rank}; lower the rank, add sources, take share='per_kind', or leave the layer out of where="
            )
        C = U[:, :rank] * column_signs(U[:, :rank])  # (m, r)
        return LowRank((self.gain * C).to(W), W.new_zeros(rank, W.shape[1]))

    def captured(self, statistics: LayerStatistics, rank: int) -> float:
        """The share Σ_{k≤r} S_k² / Σ S_k² of what the sources did that lies in C."""
        energy = common_subspace(self.updates(statistics))[1].square()
        return float(energy[:rank].sum() / energy.sum())

    def updates(self, statistics: LayerStatistics) -> list[Operator]:
        """What is stacked for this layer."""
        self._read = self._read or [read_stored(folder) for folder in self.sources]
        site, W = statistics.site, statistics.weight.cpu()
        found: list[Operator] = []
        hashes = weight_hashes(W)
        for adapter in self._read:
            adapter.check_size(site, *W.shape)
            own = adapter.update(site, lambda: W)
            if adapter.description["sites"][site]["layout"] != "conv":  # its matrix has lost the kernel, which its hash tells
                adapter.check_base(site, hashes)
            found.append(own if self.source == "delta" else Dense(W + own.dense().to(W)))
            found += [adapter.update(other) for other in self._others(adapter, site)]
        return found

    def _others(self, adapter: StoredAdapter, site: str) -> list[str]:
        """The other layers that share this one's C."""
        if self.share == "per_site":
            return []
        alike = [other for other, size in adapter.sizes.items() if other != site and size[0] == adapter.sizes[site][0]]
        kind = site.rpartition(".")[2]
        return alike if self.share == "global" else [other for other in alike if other.rpartition(".")[2] == kind]
