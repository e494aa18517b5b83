"""Folders on disk: written whole or not at all, described by a manifest, inspected without loading."""

from eckart.checkpoint.atomic import atomic_folder, check_output, leftovers, recover
from eckart.checkpoint.claims import claim_output, written
from eckart.checkpoint.folder import FolderState, inspect_folder
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.checkpoint.manifest import MANIFEST, Manifest

__all__ = [
    "MANIFEST",
    "FolderState",
    "Manifest",
    "TensorInfo",
    "atomic_folder",
    "check_output",
    "claim_output",
    "inspect_folder",
    "leftovers",
    "read_header",
    "recover",
    "written",
]
