"""What can be measured or proven about an adapter; measured and proven are never one number."""

from rankwise.certificates.asym_gap import asym_gap_bound, asym_gap_rate, calibrate
from rankwise.certificates.bit_counting import best_q, bits, compare, gap_it, gap_occam, quantize, samples_for
from rankwise.certificates.intruder_vectors import choose_damping, intruders, scale_intruders, sweep
from rankwise.certificates.rank_budget import local_rank, suggest_ranks
from rankwise.certificates.theory_asym_bound import theory_asym_bound
from rankwise.certificates.theory_information_bound import theory_information_bound
from rankwise.certificates.theory_intruder_dimensions import theory_intruder_dimensions
from rankwise.certificates.theory_spectra import delta_rank, overlap, ranks, spectrum, theory_spectra

__all__ = [
    "asym_gap_bound",
    "asym_gap_rate",
    "best_q",
    "bits",
    "calibrate",
    "choose_damping",
    "compare",
    "delta_rank",
    "gap_it",
    "gap_occam",
    "intruders",
    "local_rank",
    "overlap",
    "quantize",
    "ranks",
    "samples_for",
    "scale_intruders",
    "spectrum",
    "suggest_ranks",
    "sweep",
    "theory_asym_bound",
    "theory_information_bound",
    "theory_intruder_dimensions",
    "theory_spectra",
]
