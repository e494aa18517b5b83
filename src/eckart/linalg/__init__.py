"""Decompositions: tensors in, float64 tensors on the CPU out. No modules, no files."""

from eckart.linalg.cosines import dct, dct_columns, inverse_dct
from eckart.linalg.hadamard import walsh_hadamard
from eckart.linalg.halves import product_dtype
from eckart.linalg.krylov import leading_svd
from eckart.linalg.lowbit import pack, round_stochastically, unpack
from eckart.linalg.matricize import fold, matricize
from eckart.linalg.orthogonalise import newton_schulz
from eckart.linalg.pivot import pivot_rows
from eckart.linalg.polar import polar_factor
from eckart.linalg.power import power_step
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
    "dct",
    "dct_columns",
    "fold",
    "inverse_dct",
    "leading_svd",
    "matricize",
    "newton_schulz",
    "on_grid",
    "pack",
    "pivot_rows",
    "polar_factor",
    "power_step",
    "product_dtype",
    "product_svd",
    "round_groups",
    "round_stochastically",
    "shrink_to_diagonal",
    "symmetric_root",
    "truncated_svd",
    "unpack",
    "walsh_hadamard",
    "weighted_factors",
]
