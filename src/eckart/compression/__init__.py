"""Compression methods: one paper, one file; a weight and its moments in, its best form at every rank out."""

from eckart.compression.factorise import cut, factorise
from eckart.compression.method import CompressMethod, Need, Prepared
from eckart.compression.table import METHODS, get_method, options_for

__all__ = [
    "METHODS",
    "CompressMethod",
    "Need",
    "Prepared",
    "cut",
    "factorise",
    "get_method",
    "options_for",
]
