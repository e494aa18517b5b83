"""The shape of data and of representations: dimension, entropy, collapse, alignment, margins."""

from eckart.geometry.dimension_curve import DimensionCurve, dimension_curve
from eckart.geometry.dual_smoothing import checkerboard, dual_certified_radius
from eckart.geometry.effective_rank import effective_rank
from eckart.geometry.gaussian_universality import gaussian_universality
from eckart.geometry.ibp_tightness import gaussian_tightness, ibp_tightness
from eckart.geometry.interaction_basis import InteractionBasis, degenerate_directions, interaction_bases
from eckart.geometry.label_sharpness import label_sharpness, loss_scaling
from eckart.geometry.local_pca import local_pca
from eckart.geometry.lora_norms import lora_norms
from eckart.geometry.mle import mle_dimension
from eckart.geometry.mmcr import mmcr_gauge, mmcr_loss
from eckart.geometry.neural_collapse import collapse_norms, minority_collapse, neural_collapse
from eckart.geometry.norm_concentration import norm_concentration
from eckart.geometry.normal_bundle import normal_bundle
from eckart.geometry.pca_dimension import pca_dimension
from eckart.geometry.pruning_view import SampleGeometry, pruning_view, sample_geometry
from eckart.geometry.rich_lazy import kernel_alignment, rich_lazy, tangent_kernel
from eckart.geometry.score_gauge import score_gauge
from eckart.geometry.smoothing import certified_radius
from eckart.geometry.spectral_entropy import spectral_entropy, spectral_information
from eckart.geometry.table import GEOMETRY
from eckart.geometry.top_afa import TopAFA, TopAFAOptions, epsilon_lbo, top_afa, train_top_afa
from eckart.geometry.two_nn import two_nn

__all__ = [
    "GEOMETRY",
    "DimensionCurve",
    "InteractionBasis",
    "SampleGeometry",
    "TopAFA",
    "TopAFAOptions",
    "certified_radius",
    "checkerboard",
    "collapse_norms",
    "degenerate_directions",
    "dimension_curve",
    "dual_certified_radius",
    "effective_rank",
    "epsilon_lbo",
    "gaussian_tightness",
    "gaussian_universality",
    "ibp_tightness",
    "interaction_bases",
    "kernel_alignment",
    "label_sharpness",
    "local_pca",
    "lora_norms",
    "loss_scaling",
    "minority_collapse",
    "mle_dimension",
    "mmcr_gauge",
    "mmcr_loss",
    "neural_collapse",
    "norm_concentration",
    "normal_bundle",
    "pca_dimension",
    "pruning_view",
    "rich_lazy",
    "sample_geometry",
    "score_gauge",
    "spectral_entropy",
    "spectral_information",
    "tangent_kernel",
    "top_afa",
    "train_top_afa",
    "two_nn",
]
