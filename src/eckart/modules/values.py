"""Fewer directions of the values of an attention, head by head, and the output map refitted to them.

An output map reads z_h = Σ_j a_hj v_j of every query head h. The heads of one group share v, so they share a
basis R: v′ = R v, and the columns of each take up its part. The best R under G and Σ = E[z zᵀ] is that of the
weighted decomposition of the stacked columns; then all columns are fitted at once, across heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.arch import Attention, head_columns, head_rows
from eckart.linalg import weighted_factors
from eckart.modules.method import Piece
from eckart.modules.neurons import damped
from eckart.records import Unit


@dataclass(frozen=True, eq=False)
class PreparedValues:
    """A basis for every head of values, and the loss at every number of directions in all."""

    unit: Unit
    attention: Attention
    weights: Mapping[str, Mapping[str, Tensor]]
    second: Tensor
    """(heads · head_dim)²: Σ of what the output map reads, centred where its bias takes up the mean."""
    mean: Tensor | None
    bases: tuple[Tensor, ...]
    """Per head of values (head_dim, head_dim): row i is the i-th direction, the most useful first."""
    picked: tuple[int, ...]
    """Heads in the order in which the layer takes their next direction."""
    errors: Tensor

    def _reduction(self, width: int) -> tuple[Tensor, list[Tensor]]:
        """Rᵀ of all query heads (heads · head_dim, features), and the basis of each head of values."""
        ranks = [self.picked[:width].count(head) for head in range(self.attention.kv_heads)]
        # Orthonormal rows of the same span: columns of like size, which few bits need; the output is fitted anyway.
        kept = [torch.linalg.qr(basis[:rank].T).Q.T for basis, rank in zip(self.bases, ranks, strict=True)]
        group = self.attention.heads // self.attention.kv_heads
        blocks = [kept[head // group].T for head in range(self.attention.heads)]
        return torch.block_diag(*blocks), kept  # type: ignore[no-untyped-call]

    def _output(self, reduction: Tensor) -> Tensor:
        """The output map of the kept features, fitted to the old one."""
        old = self.weights[self.attention.output]["weight"].to("cpu", torch.float64)
        moved = damped(self.second) @ reduction  # damped on both sides: full width gives back the old map
        inside, moved = reduction.T @ moved, old @ moved
        fitted: Tensor = torch.cholesky_solve(moved.T, torch.linalg.cholesky(inside)).T
        return fitted

    def _bias(self, new: Tensor, reduction: Tensor) -> Tensor | None:
        """The bias of the output map, which takes up what the mean loses."""
        output = self.weights[self.attention.output]
        if "bias" not in output:
            return None
        bias = output["bias"].to("cpu", torch.float64)
        if self.mean is None:
            return bias
        old = output["weight"].to("cpu", torch.float64)
        return bias + old @ self.mean - new @ (reduction.T @ self.mean)

    def cut(self, width: int) -> tuple[Piece, ...]:
        attention, value = self.attention, self.weights[self.attention.value.site]
        reduction, kept = self._reduction(width)
        new = self._output(reduction)
        bias, value_bias = self._bias(new, reduction), value.get("bias")
        rows, biases, positions = [], [], []
        for head, basis in enumerate(kept):
            part = head_rows(attention.value, head, attention.head_dim)
            rows.append(basis @ value["weight"][part].to("cpu", torch.float64))
            positions.append(part.start + torch.arange(len(basis)))
            if value_bias is not None:
                biases.append(basis @ value_bias[part].to("cpu", torch.float64))
        moved = torch.cat(biases) if biases else None
        if bias is not None and moved is not None and len(self.unit.sites) == 2 and not _fused(attention):
            # Attention sums to 1, so the bias of the values is a constant that the output's takes up.
            group = attention.heads // attention.kv_heads
            spread = torch.cat([biases[head // group] for head in range(attention.heads)])
            bias, moved = bias + new @ spread, None
        columns = []
        for head in range(attention.heads):
            rank = len(kept[head // (attention.heads // attention.kv_heads)])
            columns.append(head_columns(attention, head).start + torch.arange(rank))
        return (
            Piece(
                site=attention.value.site,
                side="rows",
                weight=torch.cat(rows),
                bias=moved,
                start=attention.value.start,
                stop=attention.value.stop,
                positions=torch.cat(positions),
            ),
            Piece(
                site=attention.output,
                side="columns",
                weight=new,
                bias=bias,
                positions=torch.cat(columns),
                second=reduction.T @ self.second @ reduction,
            ),
        )

    def stand_in(self, width: int) -> tuple[str, Tensor, Tensor | None]:
        reduction, _ = self._reduction(width)
        new = self._output(reduction)
        return self.attention.output, new @ reduction.T, self._bias(new, reduction)


def _fused(attention: Attention) -> bool:
    return attention.value.site in (attention.query.site, attention.key.site)


def value_bases(target: Tensor, second: Tensor, attention: Attention) -> tuple[list[Tensor], list[Tensor]]:
    """Bases (head_dim, head_dim) and gains (head_dim,) of every head of values; ``target`` is R W (m, heads · d).

    ``second`` is Σ of the heads' outputs. Column blocks of one group are stacked, under the mean of their Σ.
    """
    bases, gains = [], []
    group = attention.heads // attention.kv_heads
    for head in range(attention.kv_heads):
        parts = [head_columns(attention, head * group + i) for i in range(group)]
        stacked = torch.cat([target[:, part] for part in parts])
        mean = torch.stack([second[part, part] for part in parts]).mean(0)
        factors = weighted_factors(stacked, mean)
        bases.append(_full_basis(factors.right, attention.head_dim))
        gains.append(-factors.errors.diff())
    return bases, gains


def _full_basis(right: Tensor, size: int) -> Tensor:
    """``right`` (r, size) with rows of zeros below, where the output has fewer features than a head."""
    return torch.cat([right, right.new_zeros(size - len(right), size)])


def picked_heads(gains: list[Tensor], size: int, equal: bool) -> tuple[tuple[int, ...], Tensor]:
    """The heads in the order of their directions' gains, or one of each in turn, and the loss at every width."""
    table = torch.stack([torch.cat([gain, gain.new_zeros(size - len(gain))]) for gain in gains])  # (heads, size)
    if equal:
        order = torch.arange(table.numel()).reshape(size, len(gains)).T.flatten().argsort()
    else:
        order = table.flatten().argsort(descending=True, stable=True)
    energies = table.flatten()[order]
    errors = energies.new_zeros(len(energies) + 1)
    errors[:-1] = energies.flip(0).cumsum(0).flip(0)
    return tuple((order // size).tolist()), errors
