"""Fewer coordinates of queries and keys: whole rotary pairs, or any directions where there is no rotary embedding.

A score is s = qᵀk. Dropping a coordinate e of both changes it by −q_e k_e, just as setting q_e to zero does, so
the loss of a set of coordinates is that of a change of q alone: tr(G_q (I − P) S_q (I − P)ᵀ), S_q = E[q qᵀ]. The
same holds for k; the two estimates differ, and their geometric mean is taken where coordinates are picked.

Queries and keys that are normalised head by head (Qwen3, Gemma3) keep their width. The root mean square runs over all
coordinates, so what is left of a head is divided by another number than before, a number that varies from token to
token and from head to head, while the norm has one weight for all heads. Tried on the small language model of the
benchmarks, turned into a Qwen3 and trained on (2.32 nats per token), with the same share of rotary pairs kept in every
layer by the scores above; rise of the loss:

    share of queries and keys kept                .875    .75    .50    .25
    pairs set to zero behind the exact norm      .0043  .0156  .1188  .4667
    the norm over what is left, as it comes      .0051  .0168  .0876  .3584
    one factor on the norm's weight              .0059  .0219  .1243  .6102
    one factor per coordinate                    .0058  .0199  .1163  .4713
    four rows with the energy of what went       .0050  .0155  .1234  .4639
    pivoted factors of both maps, as large       .0000  .0021  .0168  .1775

So the norm is not the trouble: it costs no more than the choice of pairs does. But factors of the same size lose an
eighth to a half as much, at every share, and need no such argument; a budget that has both would take them. Without
norms, on the model as it was, it is the same: .0139 and .0936 against .0016 and .0135 at .75 and .50 kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.arch import Attention, Rows, head_rows, rotary_pairs
from eckart.linalg import weighted_factors
from eckart.modules.method import Piece
from eckart.records import Unit


@dataclass(frozen=True, eq=False)
class PreparedQueries:
    """Per head of keys the coordinates or directions in the order of their use, and the loss at every width."""

    unit: Unit
    attention: Attention
    weights: Mapping[str, Mapping[str, Tensor]]
    picked: tuple[tuple[int, ...], ...]
    """(head of keys, coordinate …) in the order in which the layer takes them; a rotary pair is one entry."""
    bases: tuple[tuple[Tensor, Tensor], ...] | None
    """Without a rotary embedding, per head of keys: q′ = first · q, k′ = second · k, both (head_dim, head_dim)."""
    errors: Tensor

    def _reductions(self, width: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per head of keys: the matrices (kept, head_dim) for q and k, and the places of the kept coordinates."""
        attention = self.attention
        chosen: list[list[int]] = [[] for _ in range(attention.kv_heads)]
        taken = 0
        for head, *coordinates in self.picked:
            if taken >= width:
                break
            chosen[head] += coordinates
            taken += len(coordinates)
        found = []
        for head, coordinates in enumerate(chosen):
            if self.bases is None:
                places = torch.tensor(sorted(coordinates), dtype=torch.long)
                one = torch.eye(attention.head_dim, dtype=torch.float64)[places]
                found.append((one, one, places))
            else:
                first, second = self.bases[head]
                rank = len(coordinates)
                found.append((first[:rank], second[:rank], torch.arange(rank)))
        return found

    def cut(self, width: int) -> tuple[Piece, ...]:
        attention = self.attention
        reductions = self._reductions(width)
        group = attention.heads // attention.kv_heads
        queries = [(head, *reductions[head // group]) for head in range(attention.heads)]
        keys = [(head, k, q, places) for head, (q, k, places) in enumerate(reductions)]
        drop_bias = self.bases is not None and attention.key.site != attention.query.site
        return (
            self._piece(attention.query, queries, drop_bias=False),
            self._piece(attention.key, keys, drop_bias=drop_bias),
        )

    def _piece(self, rows: Rows, heads: list[tuple[int, Tensor, Tensor, Tensor]], *, drop_bias: bool) -> Piece:
        """The rows of all heads after their reductions. The bias of keys shifts all scores of a query alike."""
        map_ = self.weights[rows.site]
        weights, biases, places = [], [], []
        for head, own, _, kept in heads:
            part = head_rows(rows, head, self.attention.head_dim)
            weights.append(own @ map_["weight"][part].to("cpu", torch.float64))
            places.append(part.start + kept)
            if "bias" in map_:
                biases.append(own @ map_["bias"][part].to("cpu", torch.float64))
        return Piece(
            site=rows.site,
            side="rows",
            weight=torch.cat(weights),
            bias=None if drop_bias or not biases else torch.cat(biases),
            start=rows.start,
            stop=rows.stop,
            positions=torch.cat(places),
        )

    def stand_in(self, width: int) -> tuple[str, Tensor, Tensor | None]:
        attention = self.attention
        map_ = self.weights[attention.query.site]
        dense = map_["weight"].to("cpu", torch.float64).clone()
        bias = map_["bias"].to("cpu", torch.float64).clone() if "bias" in map_ else None
        group = attention.heads // attention.kv_heads
        for head, (q, k, _) in enumerate(self._reductions(width)):
            for i in range(group):
                part = head_rows(attention.query, head * group + i, attention.head_dim)
                dense[part] = k.T @ (q @ dense[part])
                if bias is not None:
                    bias[part] = k.T @ (q @ bias[part])
        return attention.query.site, dense, bias


def pair_scores(
    attention: Attention, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> list[tuple[float, tuple[int, ...]]]:
    """(loss, (head of keys, i, j)) of every pair of coordinates, the largest loss first.

    ``query`` and ``key`` are the metric of the gradients and E[q qᵀ] (E[k kᵀ]) of all heads, (rows, rows),
    both in units of the loss together. Coordinates that do not turn are paired with their neighbours.
    """
    pairs = list(rotary_pairs(attention))
    free = range(attention.rotary_dim, attention.head_dim)
    pairs += [(i, i + 1) for i in free[::2]]
    group = attention.heads // attention.kv_heads
    found = []
    for head in range(attention.kv_heads):
        for pair in pairs:
            of_queries = sum(
                _block(query, [(head * group + i) * attention.head_dim + e for e in pair]) for i in range(group)
            )
            of_keys = _block(key, [head * attention.head_dim + e for e in pair])
            found.append(((max(of_queries, 0.0) * max(of_keys, 0.0)) ** 0.5, (head, *pair)))
    return sorted(found, key=lambda item: -item[0])


def _block(metrics: tuple[Tensor, Tensor], places: list[int]) -> float:
    """tr(G S) over some coordinates."""
    at = torch.tensor(places)
    gradient, second = metrics
    return float((gradient[at][:, at] * second[at][:, at]).sum())


def directions(
    attention: Attention, query: tuple[Tensor, Tensor]
) -> tuple[list[tuple[float, tuple[int, ...]]], list[tuple[Tensor, Tensor]]]:
    """(loss, (head of keys, i)) of every direction, the largest first, and the bases of queries and keys."""
    size, group = attention.head_dim, attention.heads // attention.kv_heads
    gradient, second = query
    found: list[tuple[float, tuple[int, ...]]] = []
    bases = []
    for head in range(attention.kv_heads):
        parts = [slice((head * group + i) * size, (head * group + i + 1) * size) for i in range(group)]
        G = torch.stack([gradient[part, part] for part in parts]).sum(0)
        S = torch.stack([second[part, part] for part in parts]).mean(0)
        factors = weighted_factors(torch.eye(size, dtype=torch.float64), S, G)
        bases.append((factors.right, factors.left.T))
        found += [(float(gain), (head, i)) for i, gain in enumerate(-factors.errors.diff())]
    return sorted(found, key=lambda item: -item[0]), bases
