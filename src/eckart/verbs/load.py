"""``eckart.load``: a compressed model from its folder."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from eckart.hf.registry import load_pretrained


def load(directory: str | os.PathLike[str], *, dtype: str | None = None, device_map: str | None = None) -> nn.Module:
    """A saved model, in the class that its config names. Raises FileError where the folder is none."""
    return load_pretrained(Path(directory), dtype=dtype, device_map=device_map)
