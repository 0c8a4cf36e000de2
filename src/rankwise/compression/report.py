"""What a compression did: sizes before and after, and each layer's output error, measured and least possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        site, m, n, rank: of the layer.
        parameters_before, parameters_after: numbers in the weight; the bias is in both.
        error: ‖(W − B A) F‖_F with the factors as they are stored. F Fᵀ is the Gram of the inputs where it was collected, so
            this is the error of the layer's outputs on those inputs (see basis).
        predicted: √Σ_{i>r} σ_i(W F)², the least error that any rank r has.
        size: ‖W F‖_F, to compare with.
        basis: what F is: "outputs" (the Gram of the layer's inputs), "pooled" (in a grouped convolution: the inputs of all
            groups together, each against all rows, so an upper bound on the output error) or "weights" (F = I).
    """

    site: str
    m: int
    n: int
    rank: int
    parameters_before: int
    parameters_after: int
    error: float
    predicted: float
    size: float
    basis: str

    @property
    def relative(self) -> float:
        """Error as a part of the layer's whole output."""
        return self.error / self.size if self.size else 0.0


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """A compressed model; `str()` is a table.

    Attributes:
        method: what compressed it.
        layers: one report per compressed layer.
        parameters_before, parameters_after: of the whole model.
        skipped: layer -> why it stayed as it was.
        updated: site -> (output error before, after) of a second pass over the data, where there was one.
    """

    method: str
    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters_after: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    updated: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """Part of the model's numbers that is left."""
        return self.parameters_after / self.parameters_before

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {len(self.layers)} layers, {self.parameters_before:,} -> {self.parameters_after:,} numbers "
            f"({100 * self.kept:.1f} % of the model)"
        ]
        width = max([4, *(len(layer.site) for layer in self.layers)])
        lines.append(
            f"  {'site':{width}}  {'shape':>12} {'rank':>5} {'kept':>7} {'error':>11} {'predicted':>11} {'relative':>9}  on"
        )
        for layer in self.layers:
            kept = layer.parameters_after / layer.parameters_before
            lines.append(
                f"  {layer.site:{width}}  {f'{layer.m}×{layer.n}':>12} {layer.rank:>5} {100 * kept:>6.1f}% "
                f"{layer.error:>11.5g} {layer.predicted:>11.5g} {100 * layer.relative:>8.2f}%  {layer.basis}"
            )
        lines += [f"  {site:{width}}  second factor fitted: {a:.5g} -> {b:.5g}" for site, (a, b) in self.updated.items()]
        lines += [f"  left out  {name}  {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)
