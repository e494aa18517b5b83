"""Facts about a model: its linear maps, its blocks, its size, its identity."""

from eckart.arch.fingerprint import fingerprint
from eckart.arch.matrices import check_finite, site_matrices, stored_weight
from eckart.arch.modules import Block, find_blocks, get_module, set_module, site_module
from eckart.arch.sites import find_sites, skipped_sites
from eckart.arch.size import model_size, site_size

__all__ = [
    "Block",
    "check_finite",
    "find_blocks",
    "find_sites",
    "fingerprint",
    "get_module",
    "model_size",
    "set_module",
    "site_matrices",
    "site_module",
    "site_size",
    "skipped_sites",
    "stored_weight",
]
