"""Methods that act while a model is trained: ranks that shrink, weights that are shared, layers that are kernels."""

from eckart.training.gqsa import GroupSparseInt4, group_sparsify, quantiser_parameters
from eckart.training.lr2vq import LR2VQConv2d, LR2VQLinear, quantise_vectors
from eckart.training.maestro import Maestro
from eckart.training.method import TrainingMethod
from eckart.training.rps import StableRPS
from eckart.training.snnk import SNNKLinear, bundle
from eckart.training.table import TRAINING
from eckart.training.trp import TrainedRankPruning

__all__ = [
    "TRAINING",
    "GroupSparseInt4",
    "LR2VQConv2d",
    "LR2VQLinear",
    "Maestro",
    "SNNKLinear",
    "StableRPS",
    "TrainedRankPruning",
    "TrainingMethod",
    "bundle",
    "group_sparsify",
    "quantise_vectors",
    "quantiser_parameters",
]
