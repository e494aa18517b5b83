"""Methods that act while a model is trained: ranks that shrink, weights that are shared, layers that are kernels."""

from eckart.training.method import TrainingMethod
from eckart.training.table import TRAINING

__all__ = ["TRAINING", "TrainingMethod"]
