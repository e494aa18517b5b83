"""Drop-in layers for nn.Embedding, and for heads and tables that share its weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.layers.dense_view import dense_view
from eckart.layers.linear import INDEX_DTYPE, reordered
from eckart.records import FormKind


class Table(nn.Module):
    """What every layer in the place of an nn.Embedding shares: a table E (entries × width) in some form."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden · Eᵀ: (…, width) to (…, entries). What a tied head computes."""
        raise NotImplementedError

    @property
    def score_macs(self) -> int:
        """Multiply-adds of ``scores`` per token."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """E (entries × width), computed."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense table. Metadata is free; computing with it builds it."""
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        """``requires_grad`` of the dense table that ``to_dense`` makes."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """An nn.Embedding with the same rows (to rounding)."""
        weight = nn.Parameter(self.dense().detach(), requires_grad=self.learns)
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, _weight=weight)
        layer.weight.requires_grad_(self.learns)
        return layer.train(self.training)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        raise NotImplementedError


class StructuredEmbedding(Table):
    """What both layers share: a table E (entries × width) as narrow table ``a`` and linear map ``b``."""

    a: nn.Embedding
    b: nn.Linear
    form: FormKind

    def __init__(self, original: nn.Embedding, rank: int, bias: bool, b_out: int) -> None:
        super().__init__(original.num_embeddings, original.embedding_dim, original.padding_idx)
        weight = original.weight
        self.rank = rank
        self.a = nn.Embedding(
            original.num_embeddings,
            rank,
            padding_idx=original.padding_idx,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.b = nn.Linear(rank, b_out, bias=bias, device=weight.device, dtype=weight.dtype)

    def expand(self, rows: Tensor) -> Tensor:
        """(…, rank) entries of the narrow table to (…, width)."""
        raise NotImplementedError

    @property
    def score_macs(self) -> int:
        """Every entry of the two factors."""
        return self.a.weight.numel() + self.b.weight.numel()

    @property
    def learns(self) -> bool:
        return self.b.weight.requires_grad

    def forward(self, ids: Tensor) -> Tensor:
        return self.expand(self.a(ids))

    def dense(self) -> Tensor:
        """E (entries × width), computed."""
        return self.expand(self.a.weight)

    @property
    def weight(self) -> Tensor:
        """The dense table. Metadata is free; computing with it multiplies the factors."""
        shape = (self.num_embeddings, self.embedding_dim)
        return dense_view(self.dense, shape, self.a.weight, self.b.weight)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        return {"kind": "embedding", "form": self.form, "rank": self.rank, "bias": self.b.bias is not None}

    def extra_repr(self) -> str:
        shape = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{shape}, rank={self.rank}, padding_idx={self.padding_idx}"


class FactoredEmbedding(StructuredEmbedding):
    """E = a bᵀ: ``a`` Embedding(entries, rank), ``b`` Linear(rank, width)."""

    form = "lowrank"

    def __init__(self, original: nn.Embedding, rank: int, *, bias: bool) -> None:
        super().__init__(original, rank, bias, original.embedding_dim)

    def expand(self, rows: Tensor) -> Tensor:
        out: Tensor = self.b(rows)
        return out

    def scores(self, hidden: Tensor) -> Tensor:
        narrow = linear(hidden, self.b.weight.T)
        if self.b.bias is None:
            return linear(narrow, self.a.weight)
        return linear(narrow, self.a.weight) + (hidden @ self.b.bias).unsqueeze(-1)


class PivotedEmbedding(StructuredEmbedding):
    """``rank`` of the width's columns are kept in ``a``; ``b`` computes the others from them."""

    form = "pivoted"
    index: Tensor

    def __init__(self, original: nn.Embedding, rank: int, *, bias: bool) -> None:
        super().__init__(original, rank, bias, original.embedding_dim - rank)
        index = torch.arange(original.embedding_dim, dtype=INDEX_DTYPE, device=original.weight.device)
        self.register_buffer("index", index)

    def expand(self, rows: Tensor) -> Tensor:
        return reordered(torch.cat([rows, self.b(rows)], dim=-1), self.index)

    def scores(self, hidden: Tensor) -> Tensor:
        # Σ_j h_j E_:j over [a, a bᵀ + c] with its columns in stored order: (h_kept + h_rest b) aᵀ + h_rest c
        stored = reordered(hidden, self.index.argsort())
        kept, rest = stored[..., : self.rank], stored[..., self.rank :]
        out = linear(kept + rest @ self.b.weight, self.a.weight)
        return out if self.b.bias is None else out + (rest @ self.b.bias).unsqueeze(-1)


class TiedLayer(nn.Module):
    """A layer that owns no weight: it uses the table of an embedding elsewhere in the model.

    The table is held outside of ``_modules``, so that its tensors stay where they are: one name in the state
    dict, one entry for the optimizer, moved and cast with the embedding.
    """

    kind: ClassVar[str]

    def __init__(self, table: Table, table_name: str) -> None:
        super().__init__()
        self.table_name = table_name
        self._table = (table,)

    @property
    def table(self) -> Table:
        return self._table[0]

    def to_dense(self) -> nn.Module:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense table (entries × width)."""
        return self.table.weight

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        return {**self.table.entry(), "kind": self.kind, "table": self.table_name}

    def extra_repr(self) -> str:
        return f"tied to {self.table_name}"


class TiedHead(TiedLayer):
    """hidden ↦ hidden · Eᵀ (+ bias) with the very tensors of E; rank · (entries + width) multiply-adds for factors."""

    kind = "tied-head"
    bias: nn.Parameter | None

    def __init__(self, table: Table, table_name: str, bias: nn.Parameter | None) -> None:
        super().__init__(table, table_name)
        self.in_features = table.embedding_dim
        self.out_features = table.num_embeddings
        self.register_parameter("bias", bias)

    @property
    def own_macs(self) -> int:
        """Multiply-adds per token with the table, which is another module's."""
        return self.table.score_macs

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.table.scores(hidden)
        return out if self.bias is None else out + self.bias

    def to_dense(self) -> nn.Module:
        """An nn.Linear with a copy of the table; tying it again is the caller's job."""
        weight = self.table.dense().detach()
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        if self.bias is not None:
            layer.bias = self.bias
        return layer.train(self.training)


class TiedEmbedding(TiedLayer):
    """A second look-up in the table of another embedding (encoder and decoder of one vocabulary)."""

    kind = "tied-embedding"

    def __init__(self, table: Table, table_name: str) -> None:
        super().__init__(table, table_name)
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.padding_idx = table.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return out

    def to_dense(self) -> nn.Module:
        """An nn.Embedding with a copy of the table; tying it again is the caller's job."""
        return self.table.to_dense()
