"""Fewer heads in an attention, and the output map refitted to those that stay.

A head of keys and values leaves with the query heads that read it: its rows of q, k and v and their columns of the
output map W. The columns J that stay are fitted as those of an MLP are, W′ = W Σ_{:J} Σ_JJ⁻¹, with Σ the second moment
of all heads' outputs; heads whose outputs others can stand in for go at little cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.arch import Attention, Rows, head_columns, head_rows
from eckart.modules.method import Piece
from eckart.modules.neurons import bias_with_mean, damped, refitted_columns
from eckart.records import Unit


@dataclass(frozen=True, eq=False)
class PreparedHeads:
    """Heads of keys and values in the order in which they are kept, and the loss at every number of them."""

    unit: Unit
    attention: Attention
    weights: Mapping[str, Mapping[str, Tensor]]
    second: Tensor
    """(heads · head_dim)²: Σ of what the output map reads, centred where its bias takes up the mean."""
    mean: Tensor | None
    order: tuple[int, ...]
    """Heads of keys and values, the most useful first."""
    errors: Tensor
    refit: bool = True
    """Whether the output map is fitted to the heads that stay, or keeps their columns and its bias."""

    def kept(self, width: int) -> list[int]:
        """The heads of keys and values that stay, in the order of the model."""
        return sorted(self.order[:width])

    def _queries(self, width: int) -> list[int]:
        """The query heads that stay."""
        group = self.attention.heads // self.attention.kv_heads
        return [head * group + i for head in self.kept(width) for i in range(group)]

    def _columns(self, width: int) -> Tensor:
        """What the output map reads of them."""
        return places(head_columns(self.attention, head) for head in self._queries(width))

    def _refitted(self, width: int) -> Tensor:
        weight, columns = self.weights[self.attention.output]["weight"], self._columns(width)
        if not self.refit:
            return weight.to("cpu", torch.float64)[:, columns]
        return refitted_columns(weight, self.second, columns)

    def _bias(self, width: int) -> Tensor | None:
        output = self.weights[self.attention.output]
        if not self.refit:
            return output["bias"].to("cpu", torch.float64) if "bias" in output else None
        return bias_with_mean(output, self.mean, self._columns(width), lambda: self._refitted(width))

    def cut(self, width: int) -> tuple[Piece, ...]:
        attention, columns = self.attention, self._columns(width)
        rows = [(attention.query, self._queries(width))]
        rows += [(part, self.kept(width)) for part in (attention.key, attention.value)]
        new = self._refitted(width)
        output = Piece(
            site=attention.output,
            side="columns",
            weight=new,
            bias=self._bias(width),
            positions=None if attention.resizable else columns,
            second=self.second[columns][:, columns],
        )
        return (*(self._rows(part, heads) for part, heads in rows), output)

    def _rows(self, part: Rows, heads: Sequence[int]) -> Piece:
        map_ = self.weights[part.site]
        found = places(head_rows(part, head, self.attention.head_dim) for head in heads)
        return Piece(
            site=part.site,
            side="rows",
            weight=map_["weight"][found].to("cpu", torch.float64),
            bias=map_["bias"][found].to("cpu", torch.float64) if "bias" in map_ else None,
            start=part.start,
            stop=part.stop,
            positions=None if self.attention.resizable else found,
        )

    def stand_in(self, width: int) -> tuple[str, Tensor, Tensor | None]:
        output = self.attention.output
        dense = torch.zeros_like(self.weights[output]["weight"], dtype=torch.float64, device="cpu")
        dense[:, self._columns(width)] = self._refitted(width)
        return output, dense, self._bias(width)


def places(parts: Iterable[slice]) -> Tensor:
    """The indices of several slices, in their order."""
    return torch.cat([torch.arange(part.start, part.stop) for part in parts])


def group_columns(attention: Attention) -> list[Tensor]:
    """Per head of keys and values the columns of the output map that leave with it."""
    group = attention.heads // attention.kv_heads
    return [
        places(head_columns(attention, head * group + i) for i in range(group)) for head in range(attention.kv_heads)
    ]


def removal_order_of_groups(target: Tensor, second: Tensor, groups: Sequence[Tensor]) -> tuple[int, ...]:
    """Groups of inputs in the order of their usefulness, by optimal brain surgery; ``target`` is R W (m, n), G = RᵀR.

    Without group B, refitted, the objective rises by tr(T_B [Σ⁻¹]_BB⁻¹ T_Bᵀ) for the target T of what is left. The
    least useful goes, then T ← T − T_B [Σ⁻¹]_BB⁻¹ [Σ⁻¹]_B: and Σ⁻¹ ← Σ⁻¹ − [Σ⁻¹]_:B [Σ⁻¹]_BB⁻¹ [Σ⁻¹]_B:, one group at
    a time. Cost: O(n³) and, for g groups of d inputs, O(g² d² (m + d) + g d n (m + n)).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(second)))
    target = target.clone()
    left = list(range(len(groups)))
    removed: list[int] = []
    while left:
        roots = {i: torch.linalg.cholesky(inverse[groups[i]][:, groups[i]]) for i in left}
        parts = {
            i: torch.linalg.solve_triangular(root, target[:, groups[i]].T, upper=False) for i, root in roots.items()
        }
        gone = min(left, key=lambda i: float(parts[i].square().sum()))
        block = torch.linalg.solve_triangular(roots[gone], inverse[groups[gone]], upper=False)
        target -= parts[gone].T @ block
        inverse -= block.T @ block
        left.remove(gone)
        removed.append(gone)
    return tuple(reversed(removed))
