"""What a safetensors file says about itself, checked against its size without reading any weight."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.errors import FileError

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000
"""The limit of the safetensors format."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names and shapes of the tensors in a safetensors file.

    Raises FileError where the header is no safetensors header, or the file is not exactly as long as the
    header says: cut short, or with something behind it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise FileError(f"{path.name} is cut short or no safetensors file (its header does not fit).")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{path.name} has no valid safetensors header ({error}).") from error
    if not isinstance(header, dict):
        raise FileError(f"{path.name} has no valid safetensors header (no JSON object).")
    header.pop("__metadata__", None)
    found = {}
    spans = []
    for name, entry in header.items():
        info, span = _tensor(path, name, entry)
        found[name] = info
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise FileError(f"{path.name} has a wrong header: its tensors overlap or leave gaps.")
        end = stop
    if size != 8 + length + end:
        state = "cut short" if size < 8 + length + end else "longer than its tensors"
        raise FileError(f"{path.name} is {state}: expected {8 + length + end} bytes, found {size}.")
    return found


def _tensor(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    wrong = FileError(f"{path.name} has a wrong header: the entry of {name!r} is {str(entry)[:80]}.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _BITS or not isinstance(shape, list) or not isinstance(span, list) or len(span) != 2:
        raise wrong
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in (*shape, *span)):
        raise wrong
    if (span[1] - span[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise wrong
    return TensorInfo(dtype, tuple(shape), span[1] - span[0]), (span[0], span[1])
