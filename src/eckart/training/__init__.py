"""Methods that act while a model is trained: ranks that shrink, weights that are shared, layers that are kernels.

Transformers models with layers of theirs are saved and loaded like all others:
``eckart.hf.registry.prepare_for_saving(model)``, then ``save_pretrained``, and plain ``AutoModel.from_pretrained``
after ``import eckart``.
"""

from eckart.layers import GroupSparseInt4, LR2VQConv2d, LR2VQLinear, SNNKLinear
from eckart.training.gqsa import group_sparse, group_sparsify, quantiser_parameters
from eckart.training.gradient_norm import GradientNormPenalty
from eckart.training.lr2vq import quantise_vectors, vector_coded, vector_coded_conv
from eckart.training.maestro import Maestro
from eckart.training.orth_conv import (
    circular_singular_values,
    orthogonal_convolution_exists,
    orthogonal_convolution_penalty,
    singular_value_bounds,
)
from eckart.training.rps import StableRPS
from eckart.training.saf import MESA, SAF
from eckart.training.snnk import bundle, fit_features, raw_estimate
from eckart.training.sso import TargetSurrogate
from eckart.training.sst import SparseSpectralTraining
from eckart.training.table import TRAINING
from eckart.training.trp import TrainedRankPruning

__all__ = [
    "MESA",
    "SAF",
    "TRAINING",
    "GradientNormPenalty",
    "GroupSparseInt4",
    "LR2VQConv2d",
    "LR2VQLinear",
    "Maestro",
    "SNNKLinear",
    "SparseSpectralTraining",
    "StableRPS",
    "TargetSurrogate",
    "TrainedRankPruning",
    "bundle",
    "circular_singular_values",
    "fit_features",
    "group_sparse",
    "group_sparsify",
    "orthogonal_convolution_exists",
    "orthogonal_convolution_penalty",
    "quantise_vectors",
    "quantiser_parameters",
    "raw_estimate",
    "singular_value_bounds",
    "vector_coded",
    "vector_coded_conv",
]
