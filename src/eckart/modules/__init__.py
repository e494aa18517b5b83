"""Narrower dense blocks: fewer neurons, fewer directions of values, fewer coordinates of queries and keys."""

from eckart.modules.method import ModuleMethod, Piece, PreparedUnit
from eckart.modules.prepare import prepare_unit
from eckart.modules.table import MODULES, get_module_method
from eckart.modules.units import ALL_KINDS, NATIVE_KINDS, UnitFacts, module_units

__all__ = [
    "ALL_KINDS",
    "MODULES",
    "NATIVE_KINDS",
    "ModuleMethod",
    "Piece",
    "PreparedUnit",
    "UnitFacts",
    "get_module_method",
    "module_units",
    "prepare_unit",
]
