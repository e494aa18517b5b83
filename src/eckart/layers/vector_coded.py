"""Layers whose weight is runs of a few codes in a low-dimensional space; see :mod:`eckart.training.lr2vq`."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from eckart.errors import InputError, problems
from eckart.layers.coded import CodedLayer, code_dtype
from eckart.layers.linear import ReplacedLinear


class VectorCoded(CodedLayer):
    """What both layers share: the codes, P and the integers."""

    assignments: Tensor
    """(out · in / m,) of the smallest integer type, along the rows of the matrix."""

    shape: tuple[int, ...]
    """(out, in) or (out, in, height, width)."""

    def allocate(
        self,
        shape: tuple[int, ...],
        *,
        subvector: int,
        dimension: int,
        codes: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Register zeros. Raises InputError for sizes that do not fit."""
        self.shape = shape
        rows, columns = shape[0], math.prod(shape[1:])
        check_sizes(type(self).__name__, rows, columns, subvector, dimension, codes)
        self.subvector, self.dimension, self.codes = subvector, dimension, codes
        self.codebook = nn.Parameter(torch.zeros(codes, dimension, device=device, dtype=dtype))
        """Z (k, d̃)."""
        self.projection: nn.Parameter | None = None
        """P (m, d̃); None where d̃ = m, since there the codes hold it."""
        if dimension < subvector:
            self.projection = nn.Parameter(torch.zeros(subvector, dimension, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else None
        empty = torch.zeros(rows * columns // subvector, dtype=code_dtype(codes), device=device)
        self.register_buffer("assignments", empty)
        self.error: float | None = None
        """Relative weighted error of the fit; None for a layer that was not fitted here."""

    def levels(self) -> Tensor:
        return self.codebook

    def matrix(self) -> Tensor:
        decoded = self.codebook if self.projection is None else self.codebook @ self.projection.T
        return decoded.index_select(0, self.assignments.int()).reshape(self.shape[0], -1)

    def bake(self) -> Self:
        """The same layer with P multiplied into the codes: k · m numbers and nothing to project."""
        baked = self._like(dimension=self.subvector, codes=self.codes)
        with torch.no_grad():
            if self.projection is None:
                baked.codebook.copy_(self.codebook)
            else:
                baked.codebook.copy_(self.codebook @ self.projection.T)
            if baked.bias is not None and self.bias is not None:
                baked.bias.copy_(self.bias)
        baked.assignments = self.assignments.clone()
        baked.error = self.error
        return baked.train(self.training)

    def to_dense(self) -> nn.Module:
        """The layer with the decoded weight."""
        raise NotImplementedError

    def _like(self, *, dimension: int, codes: int) -> Self:
        """An empty layer of the same map."""
        raise NotImplementedError

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        sizes = {"subvector": self.subvector, "dimension": self.dimension, "codes": self.codes}
        return {"kind": "vector-coded", **sizes, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return f"shape={self.shape}, subvector={self.subvector}, dimension={self.dimension}, codes={self.codes}"


class LR2VQLinear(VectorCoded, ReplacedLinear):
    """y = W x + b for x (…, in), with W (out, in) decoded from codes, P and integers in every call.

    ``codebook``, ``projection`` and ``bias`` are trained, ``assignments`` are fixed. The constructor makes a layer of
    zeros for a state dict; :func:`eckart.training.vector_coded` fits one. Drop-in for nn.Linear and transformers'
    Conv1D, ``weight`` included.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        original: type[nn.Module] = nn.Linear,
        **sizes: Any,
    ) -> None:
        """``sizes``: subvector, dimension, codes, device and dtype, as ``allocate`` takes them."""
        ReplacedLinear.__init__(self, in_features, out_features, original)
        self.allocate((out_features, in_features), bias=bias, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix(), self.bias)

    def stored(self) -> Tensor:
        return self.matrix().T if self.transposed else self.matrix()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def to_dense(self) -> nn.Module:
        """A layer of the class that was replaced with the decoded weight."""
        return self.plain(self.matrix(), self.bias, self.codebook.requires_grad)

    def _like(self, *, dimension: int, codes: int) -> Self:
        return type(self)(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            original=self.original,
            subvector=self.subvector,
            dimension=dimension,
            codes=codes,
            device=self.codebook.device,
            dtype=self.codebook.dtype,
        )


class LR2VQConv2d(VectorCoded):
    """A convolution with its kernel (out, in, height, width) out of codes; subvectors run along (in, height, width)."""

    def __init__(self, geometry: nn.Conv2d, *, subvector: int, dimension: int, codes: int) -> None:
        if geometry.padding_mode != "zeros" or geometry.groups != 1:
            raise InputError(
                "LR2VQConv2d: expected one group and zero padding; got "
                f"groups={geometry.groups}, padding_mode={geometry.padding_mode!r}."
            )
        nn.Module.__init__(self)
        self.allocate(
            tuple(geometry.weight.shape),
            subvector=subvector,
            dimension=dimension,
            codes=codes,
            bias=geometry.bias is not None,
            device=geometry.weight.device,
            dtype=geometry.weight.dtype,
        )
        self.stride, self.padding, self.dilation = geometry.stride, geometry.padding, geometry.dilation

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.stored(), self.bias, self.stride, self.padding, self.dilation)

    def stored(self) -> Tensor:
        return self.matrix().reshape(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape

    def to_dense(self) -> nn.Conv2d:
        """An nn.Conv2d with the decoded kernel."""
        dense = self._geometry()
        dense.weight = nn.Parameter(self.stored().detach())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    def _geometry(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.shape[1],
            self.shape[0],
            (self.shape[2], self.shape[3]),
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            bias=self.bias is not None,
            device=self.codebook.device,
            dtype=self.codebook.dtype,
        )

    def _like(self, *, dimension: int, codes: int) -> Self:
        return type(self)(self._geometry(), subvector=self.subvector, dimension=dimension, codes=codes)


def check_sizes(what: str, rows: int, columns: int, subvector: int, dimension: int, codes: int) -> None:
    """Raises InputError with everything that does not fit a matrix (rows, columns)."""
    if found := size_faults(rows, columns, subvector, dimension, codes):
        raise InputError(problems(what, found))


def size_faults(rows: int, columns: int, subvector: int, dimension: int, codes: int) -> list[str]:
    """What does not fit a matrix (rows, columns)."""
    if subvector < 1 or columns % subvector:
        return [f"subvector divides the {columns} columns; got {subvector}"]
    found = []
    if not 1 <= dimension <= subvector:
        found.append(f"dimension is in 1 … {subvector}; got {dimension}")
    if not 1 <= codes <= rows * columns // subvector:
        found.append(f"codes is in 1 … {rows * columns // subvector}, the number of subvectors; got {codes}")
    return found
