"""``eckart.doctor``: what a folder holds, where it loads, whether it is whole."""

from __future__ import annotations

import os
from pathlib import Path

from eckart.checkpoint import FolderState, inspect_folder


def doctor(directory: str | os.PathLike[str]) -> FolderState:
    """Read every header in the folder, no weights. Raises FileError where there is no folder."""
    return inspect_folder(Path(directory))
