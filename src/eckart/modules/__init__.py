"""Narrower dense blocks: fewer neurons, directions of values, coordinates of queries and keys, or heads."""

from eckart.modules.method import ModuleMethod, Piece, PreparedUnit
from eckart.modules.place import NarrowSite, narrow_sites, replace_narrow
from eckart.modules.prepare import prepare_unit
from eckart.modules.table import MODULES, get_module_method
from eckart.modules.units import ALL_KINDS, KNOWN_KINDS, NATIVE_KINDS, UnitFacts, module_units

__all__ = [
    "ALL_KINDS",
    "KNOWN_KINDS",
    "MODULES",
    "NATIVE_KINDS",
    "ModuleMethod",
    "NarrowSite",
    "Piece",
    "PreparedUnit",
    "UnitFacts",
    "get_module_method",
    "module_units",
    "narrow_sites",
    "prepare_unit",
    "replace_narrow",
]
