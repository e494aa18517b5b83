"""Every measure of data and representations by name. A new one is one file and two lines here."""

from __future__ import annotations

from eckart.geometry.dimension_curve import METHOD as DIMENSION_CURVE
from eckart.geometry.dual_smoothing import METHOD as DUAL_SMOOTHING
from eckart.geometry.effective_rank import METHOD as EFFECTIVE_RANK
from eckart.geometry.gaussian_universality import METHOD as GAUSSIAN_UNIVERSALITY
from eckart.geometry.ibp_tightness import METHOD as IBP_TIGHTNESS
from eckart.geometry.interaction_basis import METHOD as INTERACTION_BASIS
from eckart.geometry.label_sharpness import METHOD as LABEL_SHARPNESS
from eckart.geometry.local_pca import METHOD as LOCAL_PCA
from eckart.geometry.lora_norms import METHOD as LORA_NORMS
from eckart.geometry.mle import METHOD as MLE
from eckart.geometry.mmcr import METHOD as MMCR
from eckart.geometry.neural_collapse import METHOD as NEURAL_COLLAPSE
from eckart.geometry.norm_concentration import METHOD as NORM_CONCENTRATION
from eckart.geometry.normal_bundle import METHOD as NORMAL_BUNDLE
from eckart.geometry.pca_dimension import METHOD as PCA_DIMENSION
from eckart.geometry.pruning_view import METHOD as PRUNING_VIEW
from eckart.geometry.rich_lazy import METHOD as RICH_LAZY
from eckart.geometry.score_gauge import METHOD as SCORE_GAUGE
from eckart.geometry.smoothing import METHOD as SMOOTHING
from eckart.geometry.spectral_entropy import METHOD as SPECTRAL_ENTROPY
from eckart.geometry.top_afa import METHOD as TOP_AFA
from eckart.geometry.two_nn import METHOD as TWO_NN
from eckart.records import Diagnostic

GEOMETRY: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        TWO_NN,
        MLE,
        LOCAL_PCA,
        PCA_DIMENSION,
        DIMENSION_CURVE,
        LABEL_SHARPNESS,
        SPECTRAL_ENTROPY,
        GAUSSIAN_UNIVERSALITY,
        NORM_CONCENTRATION,
        NORMAL_BUNDLE,
        SCORE_GAUGE,
        EFFECTIVE_RANK,
        NEURAL_COLLAPSE,
        MMCR,
        PRUNING_VIEW,
        RICH_LAZY,
        INTERACTION_BASIS,
        TOP_AFA,
        LORA_NORMS,
        IBP_TIGHTNESS,
        SMOOTHING,
        DUAL_SMOOTHING,
    )
}
"""In the order in which they are shown."""
