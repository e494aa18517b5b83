"""Dense layers with fewer rows or columns than the ones they replace.

An MLP takes any width, so its maps become ordinary, smaller nn.Linear or Conv1D modules that carry a mark. An attention
reshapes into heads of a fixed size: there a layer puts the rows that are left among zeros, or reads only the features
that are left, and all the code around it stays as it is. Zeros in queries, keys and values change no result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eckart.layers.dense_view import dense_view
from eckart.layers.linear import INDEX_DTYPE, MARK, ReplacedLinear, is_conv1d


class NarrowLinear(ReplacedLinear):
    """What both layers share: an ordinary nn.Linear ``a``, and the int32 buffer ``index`` of what is left."""

    a: nn.Linear
    index: Tensor
    form: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        original: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, original)
        self.rank = rank
        self.a = self._inner(bias, device, dtype)
        self.register_buffer("index", torch.arange(rank, dtype=INDEX_DTYPE, device=device))

    def _inner(self, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Linear:
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W (out × in) with zeros where nothing is left."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense matrix in the original's layout; metadata is free."""
        m, n = self.out_features, self.in_features
        if self.transposed:
            return dense_view(lambda: self.dense().T, (n, m), self.a.weight, self.a.weight)
        return dense_view(self.dense, (m, n), self.a.weight, self.a.weight)

    def to_dense(self) -> nn.Module:
        """The layer with the same outputs in the class that it replaced."""
        return self.plain(self.dense(), self.bias, self.a.weight.requires_grad)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        kind = "conv1d" if self.transposed else "linear"
        return {"kind": kind, "form": self.form, "rank": self.rank, "bias": self.a.bias is not None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={self.rank}"


class NarrowRows(NarrowLinear):
    """y (…, out) with a(x) at the places ``index`` and zeros elsewhere: rank · in numbers."""

    form = "rows"

    def _inner(self, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Linear:
        return nn.Linear(self.in_features, self.rank, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.a(x)
        zeros = kept.new_zeros((*kept.shape[:-1], self.out_features))
        return zeros.scatter(-1, self.index.long().expand(kept.shape), kept)

    def dense(self) -> Tensor:
        rows = self.a.weight
        return rows.new_zeros(self.out_features, self.in_features).index_copy(0, self.index.long(), rows)

    @property
    def bias(self) -> Tensor | None:
        if self.a.bias is None:
            return None
        return self.a.bias.new_zeros(self.out_features).index_copy(0, self.index.long(), self.a.bias)


class NarrowColumns(NarrowLinear):
    """y = a(x[…, index]): out · rank numbers."""

    form = "columns"

    def _inner(self, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Linear:
        return nn.Linear(self.rank, self.out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x.gather(-1, self.index.long().expand((*x.shape[:-1], self.rank))))
        return out

    def dense(self) -> Tensor:
        columns = self.a.weight
        return columns.new_zeros(self.out_features, self.in_features).index_copy(1, self.index.long(), columns)

    @property
    def bias(self) -> Tensor | None:
        return self.a.bias


def narrow_entry(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint has to know of a layer of ordinary shape that lost rows or columns."""
    if isinstance(module, ReplacedLinear):
        out_features, in_features = module.out_features, module.in_features
    else:
        weight = module.get_parameter("weight")
        out_features, in_features = weight.T.shape if is_conv1d(module) else weight.shape
    return {
        "kind": "narrow",
        "out": int(out_features),
        "in": int(in_features),
        "blocks": int(getattr(module, MARK)[2]),
        "bias": getattr(module, "bias", None) is not None,
    }


def widened(module: nn.Module) -> nn.Module:
    """The layer of the old size that computes the same, with zeros where rows or columns were lost."""
    out_features, in_features, blocks = getattr(module, MARK)
    transposed = is_conv1d(module)
    weight = module.get_parameter("weight").detach()
    weight = weight.T if transposed else weight
    bias = getattr(module, "bias", None)
    full = weight.new_zeros(blocks, out_features // blocks, in_features)
    kept = weight.shape[0] // blocks
    full[:, :kept, : weight.shape[1]] = weight.reshape(blocks, kept, -1)
    layer = smaller(module, out_features, in_features, bias is not None)
    with torch.no_grad():
        layer.get_parameter("weight").copy_(full.flatten(0, 1).T if transposed else full.flatten(0, 1))
        if bias is not None:
            spread = bias.new_zeros(blocks, out_features // blocks)
            spread[:, :kept] = bias.detach().reshape(blocks, kept)
            layer.get_parameter("bias").copy_(spread.flatten())
    delattr(layer, MARK)
    for parameter in layer.parameters():
        parameter.requires_grad_(module.get_parameter("weight").requires_grad)
    return layer


def smaller(original: nn.Module, out_features: int, in_features: int, bias: bool, blocks: int = 1) -> nn.Module:
    """An empty layer of the class of ``original``, an nn.Linear or Conv1D, of another size, with the mark."""
    weight = original.get_parameter("weight")
    m, n = weight.T.shape if is_conv1d(original) else weight.shape
    if is_conv1d(original):
        with torch.device(weight.device):
            layer: nn.Module = type(original)(out_features, in_features).to(weight.dtype)
    else:
        layer = nn.Linear(in_features, out_features, bias=bias, device=weight.device, dtype=weight.dtype)
    setattr(layer, MARK, getattr(original, MARK, (m, n, blocks)))
    return layer.train(original.training)


def narrow_layer(
    original: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    blocks: int = 1,
) -> nn.Module:
    """The layer in the place of ``original`` that computes ``weight`` (kept out, kept in) and ``bias``.

    ``rows`` or ``columns`` (kept,) are the places of what is left among those of the original; with neither, the
    layer is an ordinary one of that size. Numbers take the dtype and device of the original.
    """
    old = original.get_parameter("weight")
    transposed = is_conv1d(original)
    m, n = old.T.shape if transposed else old.shape
    index = columns if rows is None else rows
    if index is None:
        layer = smaller(original, weight.shape[0], weight.shape[1], bias is not None, blocks)
        inner, stored = layer, weight.T if transposed else weight
    else:
        narrow = (NarrowColumns if rows is None else NarrowRows)(
            n,
            m,
            len(index),
            bias=bias is not None,
            original=type(original) if transposed else nn.Linear,
            device=old.device,
            dtype=old.dtype,
        )
        narrow.index.copy_(index)
        layer, inner, stored = narrow, narrow.a, weight
    with torch.no_grad():
        inner.get_parameter("weight").copy_(stored)
        if bias is not None:
            inner.get_parameter("bias").copy_(bias)
        elif getattr(inner, "bias", None) is not None:
            inner.get_parameter("bias").zero_()
    for parameter in layer.parameters():
        parameter.requires_grad_(old.requires_grad)
    return layer.train(original.training)
