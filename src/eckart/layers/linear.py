"""Drop-in layers for nn.Linear and transformers' Conv1D.

Their two factors are ordinary nn.Linear children, so that PEFT, quantisers, FSDP and serving engines find
what they know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eckart.layers.dense_view import dense_view
from eckart.records import FormKind

INDEX_DTYPE = torch.int32
"""Half the size of int64."""

MARK = "narrowed_from"
"""Attribute of an ordinary layer with fewer rows or columns: (out, in, blocks) of the one that it replaced, whose rows
are so many blocks of equal size (gate and up in one map are two)."""


def is_narrowed(module: nn.Module) -> bool:
    """Whether this is a layer of ordinary shape that lost rows or columns."""
    return hasattr(module, MARK)


def keep_mark(old: nn.Module, new: nn.Module) -> None:
    """Let ``new``, which takes the place of ``old``, know what that was narrowed from."""
    if is_narrowed(old):
        setattr(new, MARK, getattr(old, MARK))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with the weight stored (in × out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def forget_mark(module: nn.Module) -> None:
    """Let a narrowed layer be an ordinary one."""
    delattr(module, MARK)


class ReplacedLinear(nn.Module):
    """What every layer in the place of an nn.Linear or Conv1D knows: its sizes, and the class that was there."""

    def __init__(self, in_features: int, out_features: int, original: type[nn.Module]) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.original = original
        """The class of the layer that this one replaces, which ``to_dense`` builds again."""

    @property
    def nf(self) -> int:
        """Name of ``out_features`` in transformers' Conv1D."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Name of ``in_features`` in transformers' Conv1D."""
        return self.in_features

    @property
    def transposed(self) -> bool:
        """Whether the original keeps its weight (in × out), as Conv1D does."""
        return self.original.__name__ == "Conv1D"

    def plain(self, weight: Tensor, bias: Tensor | None, learns: bool) -> nn.Module:
        """A layer of the original's class that computes W x + bias, for W (out × in)."""
        weight = weight.detach()
        with torch.device(weight.device):
            if self.transposed:
                layer = self.original(self.out_features, self.in_features)
                weight = weight.T
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=learns)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=learns)
        elif layer.bias is not None:
            layer.bias = nn.Parameter(weight.new_zeros(self.out_features))
        keep_mark(self, layer)
        return layer.train(self.training)


class StructuredLinear(ReplacedLinear):
    """What both layers share: y = W x + bias for x (…, in), with W (out × in) stored in few numbers."""

    a: nn.Linear
    b: nn.Linear
    form: FormKind

    def __init__(self, in_features: int, out_features: int, rank: int, original: type[nn.Module]) -> None:
        super().__init__(in_features, out_features, original)
        self.rank = rank

    def dense(self) -> Tensor:
        """W (out × in), computed: out · in · rank multiply-adds."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense matrix in the original's layout. Metadata is free; computing multiplies the factors."""
        m, n = self.out_features, self.in_features
        if self.transposed:
            return dense_view(lambda: self.dense().T, (n, m), self.a.weight, self.b.weight)
        return dense_view(self.dense, (m, n), self.a.weight, self.b.weight)

    def to_dense(self) -> nn.Module:
        """The layer with the same outputs (to rounding) in the class that it replaced."""
        return self.plain(self.dense(), self.bias, self.b.weight.requires_grad)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        kind = "conv1d" if self.transposed else "linear"
        return {"kind": kind, "form": self.form, "rank": self.rank, "bias": self.has_bias}

    @property
    def has_bias(self) -> bool:
        return self.b.bias is not None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.has_bias}"
        )


class FactoredLinear(StructuredLinear):
    """y = b(a(x)): ``a`` Linear(in, rank) without bias, ``b`` Linear(rank, out): rank (out + in) numbers."""

    form = "lowrank"

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
        super().__init__(in_features, out_features, rank, original)
        self.a = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.b = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out

    def dense(self) -> Tensor:
        return self.b.weight @ self.a.weight

    @property
    def bias(self) -> Tensor | None:
        return self.b.bias


def reordered(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index]. ``gather`` along the last dimension is 3 to 5 times as fast on a CPU as ``index_select``."""
    return x.gather(-1, index.long().expand(x.shape))


class PivotedLinear(StructuredLinear):
    """``a`` computes ``rank`` rows of W as they are, ``b`` the remaining out − rank rows from those results.

    rank · (out + in − rank) numbers and the int32 buffer ``index`` (out,), which puts the rows back in order.
    With a bias, ``a`` carries that of the kept rows and ``b`` carries bias_rest − T · bias_kept, since ``b``
    sees kept results that already contain their bias.
    """

    form = "pivoted"
    index: Tensor

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
        super().__init__(in_features, out_features, rank, original)
        self.a = nn.Linear(in_features, rank, bias=bias, device=device, dtype=dtype)
        self.b = nn.Linear(rank, out_features - rank, bias=bias, device=device, dtype=dtype)
        self.register_buffer("index", torch.arange(out_features, dtype=INDEX_DTYPE, device=device))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.a(x)
        return reordered(torch.cat([kept, self.b(kept)], dim=-1), self.index)

    def dense(self) -> Tensor:
        kept = self.a.weight
        return torch.cat([kept, self.b.weight @ kept]).index_select(0, self.index)

    @property
    def bias(self) -> Tensor | None:
        """(out,), computed: it lies in two parts."""
        if self.a.bias is None:
            return None
        return torch.cat([self.a.bias, self.b(self.a.bias)]).index_select(0, self.index)
