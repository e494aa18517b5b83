"""Decompositions: tensors in, float64 tensors on the CPU out. No modules, no files."""

from eckart.linalg.hadamard import walsh_hadamard
from eckart.linalg.krylov import leading_svd
from eckart.linalg.matricize import fold, matricize
from eckart.linalg.pivot import pivot_rows
from eckart.linalg.polar import polar_factor
from eckart.linalg.product import product_svd
from eckart.linalg.roots import symmetric_root
from eckart.linalg.rounding import Rounded, on_grid, round_groups
from eckart.linalg.shrink import shrink_to_diagonal
from eckart.linalg.svd import SVD, truncated_svd
from eckart.linalg.weighted import WeightedFactors, weighted_factors

__all__ = [
    "SVD",
    "Rounded",
    "WeightedFactors",
    "fold",
    "leading_svd",
    "matricize",
    "on_grid",
    "pivot_rows",
    "polar_factor",
    "product_svd",
    "round_groups",
    "shrink_to_diagonal",
    "symmetric_root",
    "truncated_svd",
    "walsh_hadamard",
    "weighted_factors",
]
