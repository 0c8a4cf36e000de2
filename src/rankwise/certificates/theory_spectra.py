"""Every "rank" people mean, of weights, updates and features, with one definition each.

With singular values s_1 >= … >= s_k, p_i = s_i / Σ s, e_i = s_i² / Σ s²:

    hard            #{s_i > tolerance · s_1}               stable          Σ s² / s_1²
    effective       exp(-Σ p ln p)   (Roy, Vetterli)       energy_entropy  exp(-Σ e ln e)
    participation   (Σ s²)² / Σ s⁴                         nuclear         (Σ s)² / Σ s²
    energy_rank     min k with Σ_{i<=k} e_i >= x           (x = 0.9 on W' - W: Biderman et al.)

Always 1 <= stable <= participation <= energy_entropy <= effective <= hard. The spectrum of B A (m, n) comes from the
r × r core of its factors, in O((m + n) r²). All of it is measured. Pure noise needs about half of all directions for
0.9 of its energy, so an energy rank is shown beside that of noise.

*Differs*: entropies of s and of s² are both published as "effective rank"; here they carry different names.

Roy, Vetterli: The Effective Rank, 2007. Biderman et al.: LoRA Learns Less and Forgets Less, 2024, arXiv:2405.09673. Patel,
Shwartz-Ziv: Learning to Compress: Local Rank and Information Compression in Deep Neural Networks, 2024, arXiv:2410.07687.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError, shorten
from rankwise.core.operators import Dense, Operator
from rankwise.core.protocols import Report
from rankwise.core.queries import svd

Matrix = Operator | Tensor


def spectrum(matrix: Matrix) -> Tensor:
    """Singular values (k,), descending, float32 or wider; by the small core where there are factors."""
    operator = Dense(matrix.reshape(matrix.shape[0], -1)) if isinstance(matrix, Tensor) else matrix
    with torch.no_grad():
        return svd(operator).S


def ranks(spectrum: Tensor, *, tolerance: float | None = None, energy: float = 0.9) -> dict[str, float]:
    """All rank measures of a spectrum (k,); all zero for the zero matrix.

    Args:
        spectrum: singular values, any order.
        tolerance: of the hard rank, relative to the largest; None means k · machine epsilon (give max(m, n) · eps for factors).
        energy: x of the energy rank.
    """
    if not 0.0 < energy <= 1.0:
        raise ArgumentError(f"energy is a share in (0, 1], not {energy}")
    s = spectrum.detach().double().sort(descending=True).values
    names = ("hard", "stable", "effective", "energy_entropy", "participation", "nuclear", "energy_rank")
    if not s.numel() or float(s[0]) <= 0.0:
        return dict.fromkeys(names, 0.0)
    s = s / s[0]
    square = s.square()
    e = square / square.sum()
    hard = int((s > (len(s) * torch.finfo(spectrum.dtype).eps if tolerance is None else tolerance)).sum())
    reached = int((e.cumsum(0) < energy * (1 - 1e-12)).sum()) + 1  # rounding must not ask for one more
    values = (
        hard,
        square.sum(),
        math.exp(_entropy(s / s.sum())),
        math.exp(_entropy(e)),
        square.sum().square() / square.square().sum(),
        s.sum().square() / square.sum(),
        min(reached, len(s)),
    )
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def delta_rank(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, energy: float = 0.9) -> dict[str, dict[str, float]]:
    """Rank measures of tuned - base, layer by layer, for every tensor of two or more dimensions (state dicts will do).

    `noise_share` is the norm that rounding both to their dtype leaves, over the norm of the difference: near 1, a high rank is
    that of rounding noise.

    Raises:
        ArgumentError: the two do not have the same matrices.
    """
    different = [name for name in base if base[name].dim() > 1 and (name not in tuned or tuned[name].shape != base[name].shape)]
    if different:
        raise ArgumentError(f"{shorten(different)} are missing or of another shape in the tuned weights; compare equal models")
    result = {}
    for name, W in base.items():
        if W.dim() < 2 or not W.is_floating_point():
            continue
        wide = torch.promote_types(W.dtype, torch.float32)
        difference = (tuned[name].to(wide) - W.to(wide)).reshape(W.shape[0], -1)  # (m, n)
        s = spectrum(difference)
        measured = ranks(s, tolerance=max(difference.shape) * torch.finfo(s.dtype).eps, energy=energy)
        rounding = torch.finfo(torch.promote_types(W.dtype, tuned[name].dtype)).eps * float(W.to(wide).norm()) / math.sqrt(6)
        share = rounding / float(s.norm()) if float(s.norm()) > 0 else 0.0
        result[name] = {**measured, "noise_share": min(1.0, share)}
    return result


def overlap(U: Tensor, V: Tensor) -> float:
    """‖Uᵀ V‖²_F / min(i, j) in [0, 1] for the spans of U (d, i), V (d, j): 1 contained, 0 orthogonal, max(i, j)/d at random."""
    if U.shape[0] != V.shape[0]:
        raise ArgumentError(f"subspaces of different spaces: {tuple(U.shape)} and {tuple(V.shape)}")
    left, right = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
    return float((left.t() @ right).square().sum()) / min(left.shape[1], right.shape[1])


def noise_energy_rank(m: int, n: int, *, energy: float = 0.9) -> int:
    """The energy rank of an (m, n) matrix of independent noise, by the Marchenko-Pastur law."""
    y = min(m, n) / max(m, n)
    low, high = (1 - math.sqrt(y)) ** 2, (1 + math.sqrt(y)) ** 2
    angle = torch.linspace(0, math.pi, 4097, dtype=torch.float64)[1:-1]
    value = (low + high) / 2 + (high - low) / 2 * angle.cos()  # descending; its density in the angle follows
    density = (high - low) ** 2 / 4 * angle.sin().square() / value
    count, mass = density.cumsum(0) / density.sum(), (density * value).cumsum(0) / (density * value).sum()
    return max(1, round(float(count[int((mass < energy).sum())]) * min(m, n)))


def theory_spectra(updates: Mapping[str, Matrix], *, energy: float = 0.9) -> Report:
    """Rank measures of an adapter's updates (`handle.updates()`), or of any matrices, site by site."""
    if not updates:
        raise ArgumentError("no updates; pass handle.updates() or a mapping name -> matrix")
    table = []
    for site, matrix in updates.items():
        shape = (matrix.shape[0], matrix[0].numel()) if isinstance(matrix, Tensor) else matrix.shape
        s = spectrum(matrix)
        measured = ranks(s, tolerance=max(shape) * torch.finfo(s.dtype).eps, energy=energy)
        null = noise_energy_rank(*shape, energy=energy)
        table.append(
            {"site": site, "m": shape[0], "n": shape[1], **measured, "noise_energy_rank": null, "norm": float(s.norm())}
        )
    mean = {key: sum(row[key] for row in table) / len(table) for key in ("hard", "stable", "effective", "energy_rank")}
    used = mean["stable"] / max(mean["hard"], 1.0)
    said = (
        "much of the rank is hardly used: raise the learning rate, scale by α/√r, or cut r (see suggest_ranks)"
        if used < 0.25
        else "the rank is used"
    )
    return Report(
        name="theory_spectra",
        measured={f"mean {key} rank": value for key, value in mean.items()},
        assumptions=("singular values in float32 or wider, scales included; a description, not a bound",),
        where=f"{len(table)} updates",
        reading=f"mean stable rank is {mean['stable']:.3g} of {mean['hard']:.3g} directions: {said}.",
        table=tuple(table),
    )


def _entropy(p: Tensor) -> float:
    return float(-(torch.xlogy(p, p)).sum())
