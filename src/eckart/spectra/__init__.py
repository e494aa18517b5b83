"""What the spectrum of a weight says: norms, ranks, noise edges, tails, defects."""

from eckart.spectra.bulk import Bulk, fit_bulk, marchenko_pastur, noise_of
from eckart.spectra.delta import difference
from eckart.spectra.faults import defects
from eckart.spectra.kinds import judge, verdict
from eckart.spectra.learning_rates import learning_rate_factors
from eckart.spectra.powerlaw import power_law
from eckart.spectra.ranks import energy_rank, entropy_rank, spectrum
from eckart.spectra.sketch import quick_norms
from eckart.spectra.sparsity import pruning_ratios
from eckart.spectra.table import SPECTRA
from eckart.spectra.values import Spectrum, singular_values, unmeasurable
from eckart.spectra.windows import farms

__all__ = [
    "SPECTRA",
    "Bulk",
    "Spectrum",
    "defects",
    "difference",
    "energy_rank",
    "entropy_rank",
    "farms",
    "fit_bulk",
    "judge",
    "learning_rate_factors",
    "marchenko_pastur",
    "noise_of",
    "power_law",
    "pruning_ratios",
    "quick_norms",
    "singular_values",
    "spectrum",
    "unmeasurable",
    "verdict",
]
