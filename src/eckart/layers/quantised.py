"""Drop-in layers with integer weights for nn.Linear, transformers' Conv1D and nn.Embedding.

Integers of 2, 4 or 8 bits lie packed in uint8 buffers, a scale and a zero per row and group of columns beside them
(:mod:`eckart.linalg.rounding` says how they are chosen). A linear layer can carry a low-rank repair of what rounding
lost. Buffers are no parameters: they are saved, moved and copied, but not trained; gradients pass through to the
inputs, to the repair and to the bias.

The dense weight is built in every forward pass and thrown away again. That saves memory and disk; it is no faster than
the dense layer, and slower where that is not bound by reading weights. Training through the layer keeps
the dense weight until the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from eckart.errors import InputError, problems
from eckart.layers.dense_view import dense_view
from eckart.layers.embedding import Table
from eckart.layers.linear import ReplacedLinear, is_conv1d, keep_mark
from eckart.linalg import Rounded, on_grid

PACKED_BITS = (2, 4, 8)
"""Widths that fill a byte. Five or six bits would be stored in eight, so they buy nothing."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """(m, n) uint8 below 2ᵇ to (m, ⌈n · bits / 8⌉) uint8, the first column in the lowest bits."""
    per = 8 // bits
    filled = pad(codes, (0, -codes.shape[1] % per)).view(codes.shape[0], -1, per)
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)
    return (filled.int() << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(m, columns) uint8: what :func:`pack` was given."""
    if bits == 8:
        return packed
    fields = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(1)[:, :columns]


class Quantised(nn.Module):
    """A matrix (m, n) as integers in the buffers ``codes``, ``scale`` and ``zero`` of a layer."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    columns: int

    def allocate(
        self,
        m: int,
        n: int,
        bits: int,
        group: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Register the buffers; all weights are 0 until :meth:`fill`."""
        wrong = []
        if bits not in PACKED_BITS:
            wrong.append(f"bits is 2, 4 or 8, which fill a byte; got {bits!r}")
        if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
            wrong.append(f"group is None or an int of at least 1; got {group!r}")
        if wrong:
            raise InputError(problems(type(self).__name__, wrong))
        self.bits = bits
        self.columns = n
        self.group = n if group is None else min(group, n)
        groups = -(-n // self.group)

        def packed(columns: int) -> Tensor:
            return torch.zeros(m, -(-columns * bits // 8), dtype=torch.uint8, device=device)

        self.register_buffer("codes", packed(n))
        self.register_buffer("scale", torch.ones(m, groups, device=device, dtype=dtype))
        self.register_buffer("zero", packed(groups))

    def fill(self, rounded: Rounded) -> None:
        """Take over the integers of ``rounded``. Raises InputError where they are of another shape or dtype."""
        m, n = self.codes.shape[0], self.columns
        wrong = [
            f"{what}: the layer has {ours}, the rounded weight {theirs}"
            for what, ours, theirs in (
                ("shape", (m, n), tuple(rounded.codes.shape)),
                ("bits", self.bits, rounded.bits),
                ("group", self.group, rounded.group),
                ("dtype of the scales", self.scale.dtype, rounded.scale.dtype),
            )
            if ours != theirs
        ]
        if wrong:
            raise InputError(problems(type(self).__name__, wrong))
        self.codes.copy_(pack(rounded.codes, self.bits))
        self.scale.copy_(rounded.scale)
        self.zero.copy_(pack(rounded.zero, self.bits))

    def matrix(self, rows: Tensor | None = None) -> Tensor:
        """(m, n) in the dtype of ``scale``, or the rows (k,) of it."""
        codes, scale, zero = (
            buffer if rows is None else buffer[rows] for buffer in (self.codes, self.scale, self.zero)
        )
        codes = unpack(codes, self.bits, self.columns)
        return on_grid(codes, scale, unpack(zero, self.bits, scale.shape[1]), self.group)

    @property
    def own_parameters(self) -> int:
        """Weights that are stored as integers, which no nn.Parameter counts."""
        return self.codes.shape[0] * self.columns


class QuantisedLinear(Quantised, ReplacedLinear):
    """y = Q x + b(a(x)) + bias, Q (out × in) in integers; without the repair b(a(x)) for ``rank`` 0."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group: int | None = None,
        rank: int = 0,
        bias: bool = True,
        original: type[nn.Module] = nn.Linear,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Zero weights. Raises InputError for bits, a group or a rank that cannot be."""
        ReplacedLinear.__init__(self, in_features, out_features, original)
        self.allocate(out_features, in_features, bits, group, device, dtype)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise InputError(f"QuantisedLinear: rank is an int of at least 0; got {rank!r}.")
        self.rank = rank
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        if rank:
            self.a = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
            self.b = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
            nn.init.zeros_(self.b.weight)

    @classmethod
    def from_linear(
        cls, layer: nn.Module, rounded: Rounded, repair: tuple[Tensor, Tensor] | None = None
    ) -> QuantisedLinear:
        """The layer with the rounded weight in the place of ``layer``, an nn.Linear or Conv1D.

        ``rounded`` holds (out × in), also for a Conv1D, with scales in the dtype of the layer's weight. ``repair``: a
        (rank × in) and b (out × rank), added as b a. Raises InputError where they do not fit.
        """
        weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
        transposed = is_conv1d(layer)
        m, n = weight.T.shape if transposed else weight.shape
        rank = 0 if repair is None else repair[0].shape[0]
        if repair is not None and (repair[0].shape, repair[1].shape) != ((rank, n), (m, rank)):
            shapes = " and ".join(str(tuple(part.shape)) for part in repair)
            raise InputError(f"QuantisedLinear: expected a repair of ({rank}, {n}) and ({m}, {rank}); got {shapes}.")
        new = cls(
            n,
            m,
            bits=rounded.bits,
            group=rounded.group,
            rank=rank,
            bias=bias is not None,
            original=type(layer) if transposed else nn.Linear,
            device=weight.device,
            dtype=weight.dtype,
        )
        new.fill(rounded)
        with torch.no_grad():
            if bias is not None and new.bias is not None:
                new.bias.copy_(bias).requires_grad_(bias.requires_grad)
            if repair is not None:
                for child, value in zip((new.a, new.b), repair, strict=True):
                    child.weight.copy_(value).requires_grad_(weight.requires_grad)
        keep_mark(layer, new)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.matrix(), self.bias)
        return out + self.b(self.a(x)) if self.rank else out

    def dense(self) -> Tensor:
        """Q + b a (out × in), computed."""
        return self.matrix() + self.b.weight @ self.a.weight if self.rank else self.matrix()

    @property
    def weight(self) -> Tensor:
        """The dense matrix in the original's layout. Metadata is free; computing with it builds it."""
        m, n = self.out_features, self.in_features
        learner = self.b.weight if self.rank else self.scale
        if self.transposed:
            return dense_view(lambda: self.dense().T, (n, m), self.scale, learner)
        return dense_view(self.dense, (m, n), self.scale, learner)

    @property
    def own_macs(self) -> int:
        """Multiply-adds per token with Q; those of the repair are its own."""
        return self.out_features * self.in_features

    def to_dense(self) -> nn.Module:
        """The layer with the same outputs (to rounding) in the class that it replaced; its weight learns again."""
        return self.plain(self.dense(), self.bias, learns=True)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        settings = {"bits": self.bits, "group": self.group, "rank": self.rank}
        return {"kind": "quantised", **settings, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group={self.group}, rank={self.rank}, bias={self.bias is not None}"
        )


class QuantisedEmbedding(Quantised, Table):
    """A table E (entries × width) in integers, grouped along the width; looked-up rows alone are built.

    A head that is tied to it builds all of E for every call.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group: int | None = None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        Table.__init__(self, num_embeddings, embedding_dim, padding_idx)
        self.allocate(num_embeddings, embedding_dim, bits, group, device, dtype)

    @classmethod
    def from_embedding(cls, layer: nn.Embedding, rounded: Rounded) -> QuantisedEmbedding:
        """The table with the rounded rows in the place of ``layer``. Raises InputError where they do not fit."""
        new = cls(
            layer.num_embeddings,
            layer.embedding_dim,
            bits=rounded.bits,
            group=rounded.group,
            padding_idx=layer.padding_idx,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        new.fill(rounded)
        return new.train(layer.training)

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)

    def scores(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.matrix())

    @property
    def score_macs(self) -> int:
        return self.own_parameters

    def dense(self) -> Tensor:
        return self.matrix()

    @property
    def weight(self) -> Tensor:
        return dense_view(self.dense, (self.num_embeddings, self.embedding_dim), self.scale, self.scale)

    @property
    def learns(self) -> bool:
        """A dense table learns again, as that of a quantised layer does."""
        return True

    def entry(self) -> dict[str, Any]:
        return {"kind": "quantised", "bits": self.bits, "group": self.group}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group={self.group}"


def quantised_skeleton(entry: Mapping[str, Any], original: nn.Module) -> QuantisedLinear | QuantisedEmbedding:
    """The layer without weights that ``entry`` speaks of, on the device of ``original``."""
    weight = original.get_parameter("weight")
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(original, nn.Embedding):
        return QuantisedEmbedding(
            original.num_embeddings,
            original.embedding_dim,
            bits=entry["bits"],
            group=entry["group"],
            padding_idx=original.padding_idx,
            **where,
        )
    transposed = is_conv1d(original)
    if not (transposed or isinstance(original, nn.Linear)):
        raise InputError(f"a {type(original).__name__} cannot become a quantised layer.")
    m, n = weight.T.shape if transposed else weight.shape
    return QuantisedLinear(
        n,
        m,
        bits=entry["bits"],
        group=entry["group"],
        rank=entry["rank"],
        bias=bool(entry["bias"]),
        original=type(original) if transposed else nn.Linear,
        **where,
    )
