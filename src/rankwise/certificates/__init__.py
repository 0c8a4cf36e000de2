"""What can be measured or proven about an adapter; measured and proven are never one number."""

from rankwise.certificates.theory_asym_bound import theory_asym_bound
from rankwise.certificates.theory_information_bound import theory_information_bound
from rankwise.certificates.theory_intruder_dimensions import theory_intruder_dimensions
from rankwise.certificates.theory_spectra import theory_spectra

__all__ = ["theory_asym_bound", "theory_information_bound", "theory_intruder_dimensions", "theory_spectra"]
