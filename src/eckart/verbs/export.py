"""``eckart.export``: a compressed folder in a form that loads without Eckart."""

from __future__ import annotations

import os
from pathlib import Path

from eckart.errors import InputError, unknown
from eckart.hf.remote_code import export_dense, export_remote_code

TARGETS = {"dense": export_dense, "remote-code": export_remote_code}


def export(
    directory: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write ``directory`` again as ``dense`` (ordinary weights; keeps the quality, saves nothing) or as
    ``remote-code`` (factors with the code that loads them under ``trust_remote_code=True``).

    Raises InputError for another target, FileError for folders that cannot be read or written.
    """
    if to not in TARGETS:
        raise InputError(unknown("form of export", to, TARGETS))
    path = Path(output)
    TARGETS[to](Path(directory), path, overwrite=overwrite)
    return path
