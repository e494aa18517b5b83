"""The moments file: safetensors, with a header in JSON."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.errors import FileError
from eckart.moments.packed import packed, unpack_into

FORMAT_VERSION = 1
_KEY = "eckart"
_PARTS = {"count": 2, "total": 3, "second": 4, "scale": 2, "rows": 3, "columns": 3}
"""Kinds of sums and how many dimensions they have."""


def write_file(
    path: str | os.PathLike[str], sums: Mapping[str, Tensor], structure: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Written beside ``path`` and then put in its place, so that the old file stands until the new one is whole."""
    target = Path(path)
    tensors = {}
    for name, value in sums.items():
        stored = value if name.endswith("/count") else value.to(dtype)
        tensors[name] = packed(stored) if name.endswith("/second") else stored.contiguous()
    header = json.dumps({"format_version": FORMAT_VERSION, **structure})
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode & 0o777  # what the umask allows; safetensors would leave 0600
        save_file(tensors, beside, metadata={_KEY: header})
        beside.chmod(mode)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(target)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"the moments could not be written to {target}: {error}. Is the folder there and writable, with space left?"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sums in float64 and the structure, checked against each other. Raises FileError."""
    source = Path(path)
    if not source.is_file():
        raise FileError(f"there is no moments file {source}. Make one with: eckart calibrate MODEL --data DATA -o FILE")
    try:
        with safe_open(source, framework="pt") as file:
            structure = _structure((file.metadata() or {}).get(_KEY), source)
            shapes = structure["shapes"]
            found = set(file.keys())
            if found != set(shapes):
                odd = sorted(found ^ set(shapes))[0]
                raise FileError(f"{source} is damaged: header and tensors disagree on {odd!r}. Calibrate again.")
            sums = {name: _unpacked(file.get_tensor(name), name, shapes[name], source) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{source} is no safetensors file, or is cut short ({error}). Calibrate again, or copy it again."
        ) from error
    return sums, structure


def _structure(text: str | None, source: Path) -> dict[str, Any]:
    """The header, as far as the sums rely on it."""
    if text is None:
        raise FileError(f"{source} is a safetensors file, but holds no moments of Eckart.")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise FileError(f"{source} has a header that is not JSON ({error}). Calibrate again.") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise FileError(
            f"{source} has format version {version!r}; this Eckart reads {FORMAT_VERSION}. "
            "Update Eckart, or calibrate again."
        )
    kinds = {"fingerprint": str, "input_of": dict, "shapes": dict, "meta": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(header.get(name), kind)]
    if not wrong:
        shapes, meta = header["shapes"], header["meta"]
        needed = [f"input/{key}/{part}" for key in header["input_of"].values() for part in ("count", "total")]
        wrong += [name for name in needed if name not in shapes]
        wrong += [name for name in ("tokens", "units") if not isinstance(meta.get(name), (int, float))]
        wrong += [name for name, shape in shapes.items() if not _plausible(name, shape)]
    if wrong:
        raise FileError(f"{source} is damaged: its header lacks or garbles {wrong[0]!r}. Calibrate again.")
    return dict(header)


def _plausible(name: str, shape: Any) -> bool:
    dimensions = _PARTS.get(name.rpartition("/")[2])
    if not isinstance(shape, list) or len(shape) != dimensions or not all(isinstance(n, int) for n in shape):
        return False
    return shape[0] == 2 and (dimensions != 4 or shape[2] == shape[3])


def _unpacked(stored: Tensor, name: str, shape: list[int], source: Path) -> Tensor:
    d = shape[-1]
    square = name.endswith("/second")
    expected = [*shape[:-2], d * (d + 1) // 2] if square else shape
    if list(stored.shape) != expected:
        raise FileError(
            f"{source} is damaged: {name} has shape {list(stored.shape)}, expected {expected}. Calibrate again."
        )
    if name.endswith("/count"):
        return stored.to(torch.int64)
    if not square:
        return stored.to(torch.float64)
    stack = torch.empty(shape, dtype=torch.float64)
    unpack_into(stack, stored)
    return stack
