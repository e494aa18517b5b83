"""What repeated blocks are made of: MLPs and attentions, and which rows and columns of which maps they own.

A unit says which changes of several weights at once leave the function of a model as it is. Every
statement below is held by tests on each family of :mod:`eckart.arch.families`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some output features of a linear map: rows [start, stop) of its weight (out, in), entries of its bias."""

    site: str
    """Dotted name of the module, as in :class:`eckart.records.Site`."""
    start: int = 0
    stop: int
    """Half-open. A fused map is several Rows of one site."""

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class MLP:
    """y = down(act(gate x) ⊙ up x), or down(act(up x)) where it is not gated; act works entry by entry.

    A neuron is one row of each of ``inputs``, with its bias, and one column of ``down``. Neurons may change
    places, and one whose column of ``down`` is zero may be cut out: no family here reads its width out
    of a config as it runs. Where it is gated, up's row and bias times s and the column times 1/s cancel.
    """

    name: str
    """Dotted name of the module that owns it; where that is the block itself, the block's name and ``.mlp``."""
    inputs: tuple[Rows, ...]
    """The rows of the neurons, each ``width`` long: gate, then up, or up alone. Gate and up may share a site."""
    down: str
    """Site whose input features are the neurons."""
    width: int
    """How many neurons there are."""
    depth: int | None
    """Index of the repeated block; None outside of the blocks."""
    gated: bool


@dataclass(frozen=True, kw_only=True)
class Attention:
    """output(softmax(s q kᵀ + …) v), head by head; queries of a group of heads share one head of keys and values.

    What leaves the function as it is, in evaluation mode:

    - *Values.* Per head of values, rows of ``value`` and their bias times any invertible R, and the columns
      of ``output`` of every query head of the group times R⁻¹. The bias of ``value`` may move into that of
      ``output`` (which some models lack), as attention sums to 1, save for queries that see nothing.
    - *Queries and keys*, without norms on them. Where there is no rotary embedding, per head of keys, rows of
      ``key`` times any invertible R and those of ``query`` times R⁻ᵀ, for every query head of the group; the
      bias of ``key`` may be dropped. With a rotary embedding each of its pairs allows only a rotation, the
      same on both sides, with a scale s on one and 1/s on the other; and the bias of ``key`` matters. The
      features from ``rotary_dim`` on stay free.
    - *Queries and keys with norms.* The weight and bias of the two norms: a pair times s on one side and 1/s on
      the other. Mind that Gemma's norms multiply by 1 + weight.

    Rotary pairs may not change places: each turns at a frequency of its own.
    """

    name: str
    """Dotted name of the module that owns it."""
    query: Rows
    """heads × head_dim rows."""
    key: Rows
    """kv_heads × head_dim rows."""
    value: Rows
    """kv_heads × head_dim rows."""
    output: str
    """Site whose input features are heads × head_dim."""
    heads: int
    kv_heads: int
    """Divides ``heads``; query head h reads head h // (heads / kv_heads) of the keys and values."""
    head_dim: int
    rotary: bool
    """Whether positions turn the pairs (i, i + rotary_dim / 2) of every head of queries and keys."""
    rotary_dim: int
    """How many leading features of a head turn: head_dim, or fewer; 0 without a rotary embedding."""
    query_norm: str | None
    """Module that normalises each head of queries, of head_dim weights, before the rotary embedding."""
    key_norm: str | None
    cross: bool
    """Whether keys and values come from another sequence, as in the decoder of T5."""
    depth: int | None
    """Index of the repeated block; None outside of the blocks."""
    resizable: bool = True
    """Whether a head of keys and values can be cut out of the maps with the query heads that read it, and
    nothing else changed; False where the forward pass reads the number of heads elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """The units of a model in its order, and what has no facts."""

    mlps: tuple[MLP, ...] = ()
    attentions: tuple[Attention, ...] = ()
    family: str = ""
    """Name of the family, as in ``config.model_type``; empty where it is not known."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(module name, reason); the name is ``""`` where the whole model is meant."""


def expand_kv(attention: Attention) -> tuple[int, ...]:
    """The head of keys and values that each query head reads: ``heads`` numbers in [0, kv_heads)."""
    group = attention.heads // attention.kv_heads
    return tuple(head // group for head in range(attention.heads))


def head_rows(rows: Rows, head: int, head_dim: int) -> slice:
    """The rows of one head in the weight (out, in) and the bias of ``rows.site``."""
    start = rows.start + head * head_dim
    return slice(start, start + head_dim)


def head_columns(attention: Attention, head: int) -> slice:
    """The columns of one query head in the weight (out, in) of ``attention.output``."""
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def rotary_pairs(attention: Attention) -> tuple[tuple[int, int], ...]:
    """The features inside of a head that turn together: rotary_dim / 2 pairs; none without a rotary embedding."""
    half = attention.rotary_dim // 2
    return tuple((feature, feature + half) for feature in range(half))
