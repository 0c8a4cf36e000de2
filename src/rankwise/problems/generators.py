"""Instances with a known answer, drawn from a seed: the field's classical testbeds for low-rank methods.

factorization   all of M* is seen
sensing         p Gaussian measurements
completion      some entries
robust          sensing with gross outliers, absolute loss
lora_linear     a linear layer with inputs of covariance Σ: E‖(W + s·BA) x - y‖²; with Σ = I it is factorization, exactly

M* = U diag(σ) Vᵀ with orthonormal factors from a Gaussian (V from its own numbers, never from U's) and σ from 1 down to 1/κ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.core.errors import ArgumentError
from rankwise.core.randomness import generator_for
from rankwise.problems.measurements import Everything, gaussian, random_entries
from rankwise.problems.problem import Problem

SPECTRA = ("linear", "geometric", "power")


def spectrum_of(shape: str | Sequence[float], rank: int, condition: float) -> Tensor:
    """The singular values (r,), from 1 to 1/κ: evenly spaced, geometric, or a power law; or those given.

    Raises:
        ArgumentError: an unknown shape, or as many values as ranks were not given.
    """
    if not isinstance(shape, str):
        values = torch.tensor(list(shape), dtype=torch.float64)
        if values.numel() != rank or not bool((values > 0).all()):
            raise ArgumentError(f"spectrum needs rank={rank} positive values, not {list(shape)}")
        return values
    if shape not in SPECTRA:
        raise ArgumentError(f"spectrum is one of {', '.join(SPECTRA)}, or the values themselves; not {shape!r}")
    if condition < 1.0 or (rank == 1 and condition != 1.0):
        raise ArgumentError(f"condition={condition} does not fit rank={rank}; it is σ_1/σ_r >= 1 (1 for a single value)")
    steps = torch.linspace(0.0, 1.0, rank, dtype=torch.float64)
    if shape == "linear":
        return 1.0 - steps * (1.0 - 1.0 / condition)
    if shape == "geometric":
        return condition**-steps
    counts = torch.arange(1, rank + 1, dtype=torch.float64)
    exponent = torch.log(torch.tensor(condition, dtype=torch.float64)) / torch.log(torch.tensor(max(rank, 2.0)).double())
    return counts**-exponent


def draw_truth(
    m: int,
    n: int,
    rank: int,
    condition: float,
    spectrum: str | Sequence[float],
    *,
    symmetric: bool,
    generator: torch.Generator,
) -> Tensor:
    """M* (m, n) of the given rank and spectrum."""
    if not 1 <= rank <= min(m, n):
        raise ArgumentError(f"rank={rank} does not fit a {m} × {n} matrix")
    if symmetric and m != n:
        raise ArgumentError(f"a symmetric problem is square, not {m} × {n}; leave n out or set symmetric=False")
    values = spectrum_of(spectrum, rank, condition)
    U = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q  # (m, r)
    if symmetric:
        M = (U * values) @ U.mT
        return (M + M.mT) / 2
    V = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q  # (n, r)
    return (U * values) @ V.mT


def factorization(
    *,
    m: int = 50,
    n: int | None = None,
    rank: int = 4,
    condition: float = 10.0,
    spectrum: str | Sequence[float] = "linear",
    symmetric: bool = False,
    seed: int = 0,
) -> Problem:
    """½ ‖BA - M*‖², n = 40 by default; symmetric: M* = X*X*ᵀ is (m, m)."""
    columns = n if n is not None else m if symmetric else 40
    truth = draw_truth(m, columns, rank, condition, spectrum, symmetric=symmetric, generator=generator_for(seed, "truth"))
    return Problem(
        name=f"factorization {m} × {columns} rank {rank}",
        measurement=Everything(m, columns),
        observed=truth,
        truth=truth,
        rank=rank,
        symmetric=symmetric,
    )


def sensing(
    *,
    m: int = 20,
    n: int | None = None,
    rank: int = 2,
    condition: float = 10.0,
    spectrum: str | Sequence[float] = "linear",
    measurements: int = 800,
    noise: float = 0.0,
    symmetric: bool = True,
    seed: int = 0,
) -> Problem:
    """½ ‖𝒜(BA) - y‖² with p Gaussian matrices / √p and noise of standard deviation `noise` / √p."""
    columns = m if n is None else n
    truth = draw_truth(m, columns, rank, condition, spectrum, symmetric=symmetric, generator=generator_for(seed, "truth"))
    measurement = gaussian(m, columns, measurements, symmetric=symmetric, generator=generator_for(seed, "measurement"))
    deviation = noise / measurements**0.5
    return Problem(
        name=f"sensing {m} × {columns} rank {rank}, p = {measurements}",
        measurement=measurement,
        observed=_with_noise(measurement.forward(truth), deviation, seed),
        truth=truth,
        rank=rank,
        symmetric=symmetric,
        noise=deviation,
    )


def completion(
    *,
    m: int = 60,
    n: int = 50,
    rank: int = 3,
    condition: float = 10.0,
    spectrum: str | Sequence[float] = "linear",
    rate: float = 0.3,
    noise: float = 0.0,
    seed: int = 0,
) -> Problem:
    """Entries seen with probability `rate`, with noise of standard deviation `noise`; the gradient is divided by the rate."""
    if not 0.0 < rate <= 1.0:
        raise ArgumentError(f"rate is the share of entries that are seen, in (0, 1]; not {rate}")
    truth = draw_truth(m, n, rank, condition, spectrum, symmetric=False, generator=generator_for(seed, "truth"))
    measurement = random_entries(m, n, rate, generator=generator_for(seed, "measurement"))
    deviation = noise * measurement.gain
    return Problem(
        name=f"completion {m} × {n} rank {rank}, {measurement.count} entries",
        measurement=measurement,
        observed=_with_noise(measurement.forward(truth), deviation, seed),
        truth=truth,
        rank=rank,
        noise=deviation,
    )


def robust(
    *,
    m: int = 20,
    n: int | None = None,
    rank: int = 2,
    condition: float = 10.0,
    spectrum: str | Sequence[float] = "linear",
    measurements: int = 800,
    outliers: float = 0.1,
    magnitude: float = 10.0,
    symmetric: bool = True,
    seed: int = 0,
) -> Problem:
    """Sensing in which a share of the numbers is replaced by outliers of `magnitude` times the usual size; absolute loss."""
    if not 0.0 <= outliers < 0.5:
        raise ArgumentError(f"outliers is the share of corrupted measurements, in [0, 0.5); not {outliers}")
    clean = sensing(
        m=m, n=n, rank=rank, condition=condition, spectrum=spectrum, measurements=measurements, symmetric=symmetric, seed=seed
    )
    generator = generator_for(seed, "outliers")
    hit = torch.rand(measurements, generator=generator, dtype=torch.float64) < outliers
    wrong = torch.randn(measurements, generator=generator, dtype=torch.float64) * magnitude * clean.observed.std()
    return Problem(
        name=f"robust {clean.name}, {int(hit.sum())} outliers",
        measurement=clean.measurement,
        observed=torch.where(hit, wrong, clean.observed),
        truth=clean.truth,
        rank=rank,
        symmetric=symmetric,
        loss_kind="absolute",
    )


def lora_linear(
    *,
    m: int = 50,
    n: int = 40,
    rank: int = 4,
    condition: float = 10.0,
    spectrum: str | Sequence[float] = "linear",
    scale: float = 1.0,
    input_condition: float = 1.0,
    seed: int = 0,
) -> Problem:
    """½ E‖(W + s·BA) x - W* x‖² with W* = W + s·M* and inputs of covariance Σ, whose condition is `input_condition`."""
    if scale <= 0.0 or input_condition < 1.0:
        raise ArgumentError(f"scale is positive and input_condition >= 1, not {scale} and {input_condition}")
    truth = draw_truth(m, n, rank, condition, spectrum, symmetric=False, generator=generator_for(seed, "truth"))
    root = None
    if input_condition > 1.0:
        V = torch.linalg.qr(torch.randn(n, n, generator=generator_for(seed, "inputs"), dtype=torch.float64)).Q
        root = (V * spectrum_of("geometric", n, input_condition).sqrt()) @ V.mT  # Σ^½, (n, n)
    measurement = Everything(m, n, scale=scale, root=root)
    return Problem(
        name=f"lora_linear {m} × {n} rank {rank}, s = {scale}",
        measurement=measurement,
        observed=measurement.forward(truth),
        truth=truth,
        rank=rank,
    )


def _with_noise(clean: Tensor, deviation: float, seed: int) -> Tensor:
    if deviation == 0.0:
        return clean
    return clean + deviation * torch.randn(clean.shape, generator=generator_for(seed, "noise"), dtype=clean.dtype)
