"""A linear layer of which the weights that are zero are not stored: one bit per weight, and the values that stay.

Every row keeps the same number of weights, as floats or as integers in groups. It is small on disk and no faster: the
dense weight is built for every product, or once, where :meth:`SparseLinear.unpack` was called, as loading does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.errors import InputError, problems
from eckart.layers.coded import CodedLayer
from eckart.layers.linear import ReplacedLinear, is_conv1d, keep_mark
from eckart.layers.quantised import Quantised, pack, unpack
from eckart.linalg import Rounded


class PackedValues(Quantised):
    """The values that stay, (out, kept), in integers."""

    def __init__(
        self,
        rows: int,
        kept: int,
        bits: int,
        group: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.allocate(rows, kept, bits, group, device, dtype)


class SparseLinear(CodedLayer, ReplacedLinear):
    """y = S x + bias, S (out × in) with ``kept`` weights in every row; drop-in for nn.Linear and Conv1D.

    The constructor makes a layer of zeros for a state dict; :meth:`from_linear` fills one. Values without ``bits`` are
    parameters and train, on their mask; in integers they do not.
    """

    mask: Tensor
    """(out, ⌈in / 8⌉) uint8: bit j of a row, the lowest of a byte first, says whether weight j stays."""
    unpacked: Tensor | None
    """The dense matrix, once :meth:`unpack` was called; not saved."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kept: int,
        bits: int = 0,
        group: int | None = None,
        bias: bool = True,
        original: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises InputError for ``kept`` out of 1 … in_features, and as quantised layers do."""
        ReplacedLinear.__init__(self, in_features, out_features, original)
        if not isinstance(kept, int) or isinstance(kept, bool) or not 1 <= kept <= in_features:
            raise InputError(f"SparseLinear: kept is in 1 … {in_features}, weights of a row; got {kept!r}.")
        self.kept, self.bits = kept, bits
        places = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device)
        places[:, :kept] = 1  # a valid mask until a state dict brings another
        self.register_buffer("mask", pack(places, 1))
        self.register_buffer("unpacked", None, persistent=False)
        self.values: nn.Parameter | PackedValues
        if bits:
            self.values = PackedValues(out_features, kept, bits, group, device, dtype)
        else:
            self.values = nn.Parameter(torch.zeros(out_features, kept, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls, layer: nn.Module, values: Tensor | Rounded, mask: Tensor, bias: Tensor | None = None
    ) -> SparseLinear:
        """The layer in the place of ``layer``, an nn.Linear or Conv1D, with S = ``values`` (out, kept) at ``mask``.

        ``mask``: (out, in) bool with as many weights in every row; values in the order of its rows. ``bias``: in the
        place of the layer's own, if it has one. Raises InputError where they do not fit.
        """
        weight, own = layer.get_parameter("weight"), getattr(layer, "bias", None)
        transposed = is_conv1d(layer)
        m, n = weight.T.shape if transposed else weight.shape
        counts = sorted(set(mask.sum(1).tolist())) if mask.ndim == 2 else []
        rounded = values if isinstance(values, Rounded) else None
        shape = tuple(rounded.codes.shape if rounded is not None else values.shape)  # type: ignore[union-attr]
        wrong = []
        if tuple(mask.shape) != (m, n) or mask.dtype != torch.bool:
            wrong.append(f"mask: expected bool of shape ({m}, {n}); got {mask.dtype}, {tuple(mask.shape)}")
        elif len(counts) != 1:
            wrong.append(f"mask: every row keeps as many weights; got from {min(counts)} to {max(counts)}")
        elif shape != (m, counts[0]):
            wrong.append(f"values: expected shape ({m}, {counts[0]}); got {shape}")
        if wrong:
            raise InputError(problems("SparseLinear", wrong))
        new = cls(
            n,
            m,
            kept=counts[0],
            bits=0 if rounded is None else rounded.bits,
            group=None if rounded is None else rounded.group,
            bias=own is not None,
            original=type(layer) if transposed else nn.Linear,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            new.mask.copy_(pack(mask.to(torch.uint8), 1))
            if rounded is not None and isinstance(new.values, PackedValues):
                new.values.fill(rounded)
            elif isinstance(new.values, nn.Parameter) and isinstance(values, Tensor):
                new.values.copy_(values).requires_grad_(weight.requires_grad)
            if own is not None and new.bias is not None:
                new.bias.copy_(own if bias is None else bias).requires_grad_(own.requires_grad)
        keep_mark(layer, new)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.unpacked is not None and torch.is_grad_enabled() and self.levels().requires_grad:
            self.unpacked = None  # the values are about to change
        return linear(x, self.matrix() if self.unpacked is None else self.unpacked, self.bias)

    def unpack(self) -> None:
        """Keep the dense matrix beside, so that a product costs what it does in a dense layer; training drops it."""
        self.unpacked = self.matrix().detach()

    def places(self) -> Tensor:
        """(out, in) bool: which weights stay."""
        return unpack(self.mask, 1, self.in_features).bool()

    def levels(self) -> Tensor:
        return self.values.scale if isinstance(self.values, PackedValues) else self.values

    def matrix(self) -> Tensor:
        values = self.values.matrix() if isinstance(self.values, PackedValues) else self.values
        return values.new_zeros(self.out_features, self.in_features).masked_scatter(self.places(), values)

    def stored(self) -> Tensor:
        return self.matrix().T if self.transposed else self.matrix()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def to_dense(self) -> nn.Module:
        """A layer of the class that was replaced with the weight as it is, zeros and all; it learns again."""
        return self.plain(self.matrix(), self.bias, learns=True)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        stored: dict[str, Any] = {"kind": "sparse", "kept": self.kept, "bias": self.bias is not None}
        if isinstance(self.values, PackedValues):
            stored |= {"bits": self.bits, "group": self.values.group}
        return stored

    def extra_repr(self) -> str:
        bits = f", bits={self.bits}" if self.bits else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, kept={self.kept}{bits}, "
            f"bias={self.bias is not None}"
        )


def sparse_skeleton(entry: Mapping[str, Any], original: nn.Module) -> SparseLinear:
    """The layer of zeros that ``entry`` speaks of, on the device of ``original``."""
    transposed = is_conv1d(original)
    if not (transposed or isinstance(original, nn.Linear)):
        raise InputError(f"a {type(original).__name__} cannot become a sparse layer.")
    weight = original.get_parameter("weight")
    m, n = weight.T.shape if transposed else weight.shape
    new = SparseLinear(
        n,
        m,
        kept=entry["kept"],
        bits=entry.get("bits", 0),
        group=entry.get("group"),
        bias=bool(entry["bias"]),
        original=type(original) if transposed else nn.Linear,
        device=weight.device,
        dtype=weight.dtype,
    )
    keep_mark(original, new)
    return new
