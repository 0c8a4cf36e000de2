"""Certificates: what can be measured or proven about an adapter. Ready callables that return a `Report`."""

from __future__ import annotations

from rankwise import certificates
from rankwise.core.catalog import Reference, entry

theory_spectra = entry(
    "certificate",
    title="Rank measures",
    formula="hard, stable, effective, participation, nuclear and energy rank of W' - W",
    reference=Reference("Biderman et al.", "LoRA Learns Less and Forgets Less", 2024, "2405.09673"),
    cost="(m + n) r² FLOPs per site with factors, m·n·min(m, n) without",
    when="To see whether the rank you train is used, and how much of a full update a rank would keep.",
)(certificates.theory_spectra)

theory_intruder_dimensions = entry(
    "certificate",
    title="Intruder dimensions",
    formula="#{j <= k: max_i |⟨u'_j, u_i⟩| < ε}",
    reference=Reference("Shuttleworth et al.", "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, "2410.21228"),
    cost="two decompositions of (m, n) per site",
    exports="the damped adapter, exact at rank r + #intruders",
    when="When the base's abilities must survive: a cheap warning, and a knob after training.",
)(certificates.theory_intruder_dimensions)

theory_asym_bound = entry(
    "certificate",
    title="Asymmetric gap bound",
    formula="gap <= 2cβ/N·√Σ‖A x_i‖² + 3M√(ln(2/δ)/2N); rate √(r/N)",
    reference=Reference(
        "Kratsios et al.",
        "Sharp Generalization Bounds for Foundation Models with Asymmetric Randomized Low-Rank Adapters",
        2025,
        "2506.14530",
    ),
    cost="one forward for ‖A x_i‖",
    when="To weigh rank against samples with A frozen, calibrated on your own measured gaps; no guarantee for a deep net.",
)(certificates.theory_asym_bound)

theory_information_bound = entry(
    "certificate",
    title="Bits-counting bound",
    formula="gap <= √((P q ln 2 + ln(1/δ)) / 2N)",
    reference=Reference("Zhu et al.", "Asymmetry in Low-Rank Adapters of Foundation Models", 2024, "2402.16842"),
    cost="none",
    exports="with best_q, the quantized adapter",
    when="To rank methods by what they can memorize; the number itself is vacuous above about a thousand trained numbers.",
)(certificates.theory_information_bound)
