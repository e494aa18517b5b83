"""A linear layer of which some groups of weights are left, in 4-bit codes; see :mod:`eckart.training.gqsa`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.errors import InputError
from eckart.layers.coded import CodedLayer, code_dtype
from eckart.layers.linear import ReplacedLinear


class GroupSparseInt4(CodedLayer, ReplacedLinear):
    """y = W x + b for x (…, in), with W (out, in) decoded from ``kept`` groups of 4-bit codes in every call.

    ``scales``, ``zeros`` and ``bias`` are trained, codes and places are fixed. The constructor makes a layer of zeros
    for a state dict; :func:`eckart.training.group_sparse` fits one. Drop-in for nn.Linear and transformers' Conv1D,
    ``weight`` included. Raises InputError for a group that does not divide in, or is odd, and for ``kept`` out of
    1 … out · in / group.
    """

    row_pointers: Tensor
    """(out + 1,) int32: the groups of row i are those from entry i up to entry i + 1."""
    columns: Tensor
    """(kept,): which group of its row each one is, in the smallest integer type."""
    packed: Tensor
    """(kept, group / 2) uint8: two codes per byte, the first one in the low half."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kept: int,
        group: int = 16,
        bias: bool = True,
        original: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        ReplacedLinear.__init__(self, in_features, out_features, original)
        if fault := group_fault(in_features, group):
            raise InputError(f"GroupSparseInt4: {fault}.")
        everything = out_features * in_features // group
        if not 1 <= kept <= everything:
            raise InputError(f"GroupSparseInt4: kept is in 1 … {everything}, the number of groups; got {kept}.")
        self.group = group
        self.scales = nn.Parameter(torch.zeros(kept, device=device, dtype=dtype))
        """s, one per kept group; these and ``zeros`` are what is tuned."""
        self.zeros = nn.Parameter(torch.zeros(kept, device=device, dtype=dtype))
        """z, in units of codes, not rounded."""
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        pointers = torch.zeros(out_features + 1, dtype=torch.int32, device=device)
        pointers[1:] = kept  # all groups in the first row, a valid layout until a state dict brings another
        self.register_buffer("row_pointers", pointers)
        columns = torch.zeros(kept, dtype=code_dtype(in_features // group), device=device)
        self.register_buffer("columns", columns)
        self.register_buffer("packed", torch.zeros(kept, group // 2, dtype=torch.uint8, device=device))
        self.error: float | None = None
        """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of the fit; None for a layer that was not fitted here."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.matrix(), self.bias)

    def levels(self) -> Tensor:
        return self.scales

    def matrix(self) -> Tensor:
        codes = torch.stack([self.packed & 15, self.packed >> 4], dim=-1).flatten(1)
        values = (codes - self.zeros[:, None]) * self.scales[:, None]
        places = torch.arange(len(values), dtype=torch.int32, device=values.device)
        rows = torch.bucketize(places, self.row_pointers[1:], right=True)
        empty = values.new_zeros(self.out_features, self.in_features // self.group, self.group)
        return empty.index_put((rows, self.columns.long()), values).flatten(1)

    def stored(self) -> Tensor:
        return self.matrix().T if self.transposed else self.matrix()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def to_dense(self) -> nn.Module:
        """A layer of the class that was replaced with the decoded weight, zeros and all."""
        return self.plain(self.matrix(), self.bias, self.scales.requires_grad)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        return {"kind": "group-sparse", "kept": len(self.scales), "group": self.group, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        kept = len(self.scales) / (self.out_features * self.in_features // self.group)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}, kept={kept:.3f}, "
            f"bias={self.bias is not None}"
        )


def group_fault(in_features: int, group: int) -> str | None:
    """Why groups of this size do not fit; None where they do."""
    if group < 2 or group % 2 or in_features % group:
        return f"group is even and divides the {in_features} columns; got {group}"
    return None
