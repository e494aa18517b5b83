"""Facts about a model: its linear maps, its blocks and what they are made of, its size, its identity."""

from eckart.arch.families import family_of, find_units
from eckart.arch.fingerprint import fingerprint
from eckart.arch.matrices import check_finite, site_matrices, stored_weight
from eckart.arch.modules import Block, find_blocks, get_module, set_module, site_module
from eckart.arch.sites import find_sites, name_matches, skipped_sites
from eckart.arch.size import model_size, site_size
from eckart.arch.stream import Stream, find_stream
from eckart.arch.units import MLP, Attention, Rows, Units, expand_kv, head_columns, head_rows, rotary_pairs

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Rows",
    "Stream",
    "Units",
    "check_finite",
    "expand_kv",
    "family_of",
    "find_blocks",
    "find_sites",
    "find_stream",
    "find_units",
    "fingerprint",
    "get_module",
    "head_columns",
    "head_rows",
    "model_size",
    "name_matches",
    "rotary_pairs",
    "set_module",
    "site_matrices",
    "site_module",
    "site_size",
    "skipped_sites",
    "stored_weight",
]
