"""Weights in files: read where they lie, and written tensor by tensor, so that neither takes memory of its own."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.checkpoint.folder import inspect_folder
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.errors import FileError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Names of the safetensors format. Others, such as 8-bit floats, are not read here."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of every tensor of a file, by name."""


class Weights(Mapping[str, Tensor]):
    """The tensors of a model folder, each a view of its file.

    A view takes no memory of its own: the system reads the pages that are used, and drops them again where it
    runs short. Writing into one changes a private copy, never the file.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], where: Mapping[str, str]) -> None:
        self.folder = folder
        self.infos = infos
        """Dtype and shape of every tensor, without opening its file."""
        self._where = where
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._where[name]
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FileError(f"{self.folder / file} cannot be read: {error}.") from error
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_weights(folder: str | Path) -> Weights:
    """The weights of a folder, after every file was checked against its header and the index.

    Raises FileError with everything that is wrong: files missing, cut short, outside of the folder, pickled.
    """
    state = inspect_folder(folder).require_whole()
    where: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    for file in state.weight_files:
        header = read_header(Path(folder) / file)
        where.update(dict.fromkeys(header, file))
        infos.update(header)
    return Weights(Path(folder), infos, where)


@dataclass(frozen=True)
class Mark:
    """What a finished file is known by."""

    bytes: int
    crc: int
    """CRC-32 of all its bytes."""

    def fits(self, path: Path, *, content: bool) -> bool:
        """Whether the file has this length and, with ``content``, these bytes (1 to 2 GB a second)."""
        if not path.is_file() or path.stat().st_size != self.bytes:
            return False
        return not content or crc_of(path) == self.crc


def crc_of(path: Path) -> int:
    """CRC-32 of a file, read a piece at a time."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


class TensorWriter:
    """Writes one safetensors file tensor by tensor, in the order of ``layout``; the file appears when all are there.

    Used as a context; an error inside leaves nothing. Tensors of wider numbers come first, so that every one
    lies at a multiple of its width, as readers expect. ``mark`` describes the file afterwards.
    """

    mark: Mark
    seconds: float
    """Spent on the CRC."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.names = list(layout)
        self._layout = layout
        self._crc = 0
        self.seconds = 0.0
        self._beside = path.with_name(f".{path.name}.part")

    @staticmethod
    def ordered(layout: Layout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The layout with wider numbers first, otherwise in its order."""
        return dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))

    def __enter__(self) -> Self:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in self._layout.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            if start % dtype.itemsize:
                raise FileError(f"{self.path.name}: {name} would lie at an odd address; order the layout first.")
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = self._beside.open("wb")
        self._waiting = iter(self._layout.items())
        self._put(len(text).to_bytes(8, "little") + text)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor. Raises ValueError where it is not the one that the layout has next."""
        expected, (dtype, shape) = next(self._waiting)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
            raise ValueError(f"expected {expected} {dtype} {shape}; got {name} {tensor.dtype} {tuple(tensor.shape)}.")
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._put(flat.view(torch.uint8).numpy().data)

    def _put(self, raw: bytes | memoryview) -> None:
        begin = time.perf_counter()
        self._crc = zlib.crc32(raw, self._crc)
        self.seconds += time.perf_counter() - begin
        self._file.write(raw)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._beside.unlink(missing_ok=True)
            return
        if (left := next(self._waiting, None)) is not None:
            self._beside.unlink()
            raise ValueError(f"{self.path.name}: {left[0]} was never written.")
        self.mark = Mark(self._beside.stat().st_size, self._crc)
        self._beside.replace(self.path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file as views of it. Raises FileError where it is none or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file with metadata, written beside its place and then put there: the old one stands until then.

    Raises FileError where it cannot be written: no such folder, no permission, a full disk.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode & 0o777  # what the umask allows; safetensors would leave 0600
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata=dict(metadata))
        beside.chmod(mode)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} could not be written: {error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises FileError where it is none or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read: {error}.") from error
