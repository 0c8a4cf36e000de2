"""Parameterizations whose update has a high rank for few numbers: products of factors, frequencies, blocks, sparse entries."""

from __future__ import annotations

from rankwise.catalog.building import adapter
from rankwise.core.catalog import Reference, entry
from rankwise.core.piece import piece
from rankwise.core.recipe import Recipe
from rankwise.parameterizations.loha import LoHa


@entry(
    "parameterization",
    title="LoHa (FedPara)",
    formula="W + s·(B₁ A₁) ∘ (B₂ A₂)",
    reference=Reference(
        "Hyeon-Woo, Ye-Bin, Oh",
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
        2021,
        "2108.06098",
    ),
    trained="2r(m + n)",
    cost="2r²(m + n) FLOPs per token as LoRA of rank r², or 4mnr per forward to make the matrix, whichever is less",
    merges="exact",
    exports="exact at rank r²",
    when="When the change has a high rank and its numbers must be few, as in image models; tune alpha, since four factors multiply.",
    tiny={"rank": 2},
    numbers="2*rank*(m+n)",
    flops="2*T*rank**2*(m+n) if 6*T*rank**2*(m+n) < 2*T*m*n + 16*m*n*rank else 4*m*n*rank",
    variants=("loha(rank=2, tucker=True)", "loha(rank=2, start='lycoris')", "loha(rank=6, alpha=3)"),
)
def loha(
    *, rank: int = 8, alpha: float | None = None, tucker: bool = False, start: str = "zero", dropout: float = 0.0
) -> Recipe:
    """The product, entry by entry, of two low-rank matrices: rank up to r² from the numbers of rank 2r."""
    return adapter(piece(LoHa, rank=rank, alpha=alpha, tucker=tucker, start=start, dropout=dropout), name="loha")
