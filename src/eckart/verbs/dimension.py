"""``eckart.dimension``: the intrinsic dimension of data, as a curve over scale."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eckart.checkpoint.weights import read_tensors
from eckart.errors import FileError, InputError, unknown
from eckart.geometry import DimensionCurve, dimension_curve
from eckart.report import render_dimension

PointsLike = str | os.PathLike[str] | Tensor | np.ndarray[Any, Any] | Sequence[Sequence[float]]
"""A ``.npy`` or ``.safetensors`` file, a tensor, an array, or a list of rows."""


@dataclass(frozen=True, kw_only=True)
class DataDimension(DimensionCurve):
    """The curve of one data set, with the page that shows it."""

    title: str
    source: str = ""
    """The file; empty for data in memory."""

    def page(self, command: str = "") -> str:
        """The report as one HTML file."""
        meta = {"file": self.source} if self.source else {}
        return render_dimension(self, title=self.title, command=command, meta=meta)

    def _repr_html_(self) -> str:
        """The verdict for notebooks."""
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<p>{html.escape(self.verdict)}</p>{f'<ul>{notes}</ul>' if notes else ''}"


def dimension(
    data: PointsLike, *, name: str | None = None, neighbours: int = 20, at_most: int | None = 10_000, seed: int = 0
) -> DataDimension:
    """How many coordinates it takes to say where a point of ``data`` lies, at every scale.

    Args:
        data: points (n, D), one a row: a ``.npy`` or ``.safetensors`` file, a tensor, an array, or rows. More than two
            dimensions, as images have, are flattened to one row a point.
        name: the tensor of a ``.safetensors`` file that holds several.
        neighbours: how many neighbours the estimators look at.
        at_most: of more rows that many are drawn by ``seed``; None takes all.

    Duplicates are dropped and counted; readings above about 15 are marked “at least”. Cost: about 2 n² D multiply-adds.
    Estimators and verdict are those of :func:`eckart.geometry.dimension_curve`.

    Raises InputError for data that are no matrix of numbers, and options out of range; NotFiniteError for NaN and Inf;
    FileError for a file that is missing, cut short or of another kind.
    """
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        points, title, source = read_points(path, name), path.name, str(path)
    elif name is not None:
        raise InputError("name says which tensor of a file is meant; data in memory have none.")
    else:
        points, title, source = _tensor(data, "data"), "data", ""
    if points.ndim > 2:
        points = points.flatten(1)
    found = dimension_curve(points, k=neighbours, seed=seed, at_most=at_most)
    return DataDimension(**vars(found), title=title, source=source)


def read_points(path: Path, name: str | None = None) -> Tensor:
    """The array of a ``.npy`` file, or one tensor of a ``.safetensors`` file. Raises FileError and InputError."""
    if not path.is_file():
        raise FileError(f"there is no file {path}." if not path.exists() else f"{path} is a folder; name a file.")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
        if name is None and len(tensors) != 1:
            shown = ", ".join(list(tensors)[:8]) + (", …" if len(tensors) > 8 else "")
            raise InputError(f"{path.name} holds {len(tensors)} tensors ({shown or 'none'}); say which one: --name.")
        if name is not None and name not in tensors:
            raise InputError(unknown("tensor", name, tensors))
        return next(iter(tensors.values())) if name is None else tensors[name]
    if path.suffix != ".npy":
        raise InputError(f"expected a .npy or .safetensors file; got {path.name}. Write one with numpy.save(FILE, X).")
    if name is not None:
        raise InputError(f"{path.name} holds one array; --name is for .safetensors files.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FileError(f"{path} cannot be read: {error}. It is cut short, or holds Python objects.") from error
    return _tensor(array, path.name)


def _tensor(data: Any, what: str) -> Tensor:
    """Numbers as a tensor. Raises InputError for texts, dates, records and ragged rows."""
    if isinstance(data, Tensor):
        return data
    try:
        array = np.asarray(data)
    except ValueError as error:
        raise InputError(f"{what}: expected rows of the same length; {error}.") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(f"{what}: expected numbers (n, D); got an array of {array.dtype}.")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.float64)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.array(native))  # a copy: arrays that were mapped or frozen may not be written
