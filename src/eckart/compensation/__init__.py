"""Low-rank repair of what compression, quantisation or pruning lost: W and Ŵ in, two factors out."""

from eckart.compensation.damage import Damage, dense_map, find_damage
from eckart.compensation.method import CompensateMethod, Repair
from eckart.compensation.spread import spread_ranks
from eckart.compensation.table import COMPENSATIONS, compensation_options, get_compensation

__all__ = [
    "COMPENSATIONS",
    "CompensateMethod",
    "Damage",
    "Repair",
    "compensation_options",
    "dense_map",
    "find_damage",
    "get_compensation",
    "spread_ranks",
]
