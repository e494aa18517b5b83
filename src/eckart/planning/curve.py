"""What a site may become, what each possibility costs, and what it loses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eckart.arch import site_size
from eckart.errors import InputError, NotFiniteError, unknown
from eckart.records import FormKind, Site, Size, Unit

FORMS: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted", "narrow", "sparse")
INDEX_BYTES = 4
"""Layers store the row order of the pivoted form, and the positions of the narrow one, as int32."""


@dataclass(frozen=True)
class Choice:
    """One thing that a site may become."""

    form: FormKind
    rank: int
    """Of every slice; the full rank for dense, and weights kept in a row for sparse."""
    size: Size
    """Of the weight with its indices, over all slices, biases left out."""
    loss: float
    """The method's objective times its loss scale: predicted rise of the loss, for methods in that unit."""
    bits: int = 0
    """Bits per number; 0: as the model stores them."""
    repair: int = 0
    """Rank of the correction beside a quantised weight."""


class Choices(Sequence[Choice]):
    """Choices as columns, since a model has hundreds of sites with thousands of ranks each."""

    def __init__(
        self,
        form: NDArray[np.int64],
        rank: NDArray[np.int64],
        parameters: NDArray[np.int64],
        bytes: NDArray[np.int64],
        macs: NDArray[np.int64],
        loss: NDArray[np.float64],
        bits: NDArray[np.int64] | None = None,
        repair: NDArray[np.int64] | None = None,
        *,
        whole: Size,
    ) -> None:
        self.whole = whole
        """What the site costs as it is, whether dense is among the choices or not."""
        self.form = form
        """Positions in FORMS."""
        self.rank = rank
        self.parameters = parameters
        self.bytes = bytes
        self.macs = macs
        self.loss = loss
        self.bits = np.zeros_like(rank) if bits is None else bits
        self.repair = np.zeros_like(rank) if repair is None else repair

    @classmethod
    def of(cls, choices: Iterable[Choice], *, whole: Size) -> Choices:
        """The columns of single choices of a site that costs ``whole`` as it is."""
        rows = list(choices)
        return cls(
            np.array([FORMS.index(c.form) for c in rows], np.int64),
            np.array([c.rank for c in rows], np.int64),
            np.array([c.size.parameters for c in rows], np.int64),
            np.array([c.size.bytes for c in rows], np.int64),
            np.array([c.size.macs for c in rows], np.int64),
            np.array([c.loss for c in rows], np.float64),
            np.array([c.bits for c in rows], np.int64),
            np.array([c.repair for c in rows], np.int64),
            whole=whole,
        )

    @classmethod
    def stored(cls, columns: Sequence[NDArray[Any]], whole: Sequence[int]) -> Choices:
        """Out of :meth:`columns`, and what the site costs as it is: parameters, bytes, multiply-adds."""
        parameters, in_bytes, macs = whole
        return cls(*columns, whole=Size(parameters=parameters, bytes=in_bytes, macs=macs))

    def __len__(self) -> int:
        return len(self.rank)

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> Choices: ...
    def __getitem__(self, index: int | slice) -> Choice | Choices:
        if isinstance(index, slice):
            return Choices(*(column[index] for column in self.columns()), whole=self.whole)
        row = [column[index].item() for column in self.columns()]
        size = Size(parameters=row[2], bytes=row[3], macs=row[4])
        return Choice(form=FORMS[row[0]], rank=row[1], size=size, loss=row[5], bits=row[6], repair=row[7])

    def columns(self) -> tuple[NDArray[Any], ...]:
        """In the order of the constructor."""
        return self.form, self.rank, self.parameters, self.bytes, self.macs, self.loss, self.bits, self.repair

    def scaled(self, factor: float) -> Choices:
        """The same choices, with losses times ``factor``."""
        columns = list(self.columns())
        columns[5] = columns[5] * factor
        return Choices(*columns, whole=self.whole)

    @classmethod
    def joined(cls, parts: Sequence[Choices]) -> Choices:
        """Choices of one site from several lists."""
        columns = (np.concatenate(column) for column in zip(*(part.columns() for part in parts), strict=True))
        return cls(*columns, whole=parts[0].whole)


@dataclass(frozen=True, eq=False)
class Curve:
    """The choices of one site, or of one unit of maps that become narrower together."""

    site: Site | Unit
    choices: Choices

    def __post_init__(self) -> None:
        if not len(self.choices):
            raise InputError(f"{self.site.name}: a curve needs at least one choice; got none.")
        if not np.isfinite(self.choices.loss).all():
            raise NotFiniteError(f"{self.site.name}: the error curve holds NaN or Inf.")


def choices_for(
    site: Site,
    errors: ArrayLike,
    *,
    scale: float = 1.0,
    forms: Sequence[FormKind] = FORMS,
    rank_multiple: int = 1,
    min_rank: int = 1,
    bytes_per_number: int = 4,
    index_bytes: int = INDEX_BYTES,
) -> Choices:
    """Every form and rank that a site of m × n slices may have.

    ``errors`` (full_rank + 1,) is the method's objective at rank 0 … full, summed over the slices, and
    ``scale`` turns it into a rise of the loss. Parameters per slice: dense m n, factored k (m + n), pivoted
    k (m + n − k), whose m indices count in bytes only. Multiply-adds equal parameters, except that
    looking up an embedding skips the k × entries factor, and that a tied table is also a head.

    Ranks are multiples of ``rank_multiple`` from ``min_rank`` to the full rank. A site that has no such rank
    can only be dense. Raises InputError where nothing is left, for unknown forms and options out of range.
    """
    wrong = [unknown("form", form, FORMS) for form in forms if form not in FORMS]
    if wrong:
        raise InputError(" ".join(wrong))
    if rank_multiple < 1 or min_rank < 1 or bytes_per_number < 1 or index_bytes < 1:
        raise InputError(
            "rank_multiple, min_rank, bytes_per_number and index_bytes count from 1; "
            f"got {rank_multiple}, {min_rank}, {bytes_per_number}, {index_bytes}."
        )
    objective = np.asarray(errors, np.float64)
    if objective.shape != (site.full_rank + 1,):
        raise InputError(
            f"{site.name}: expected errors at rank 0 … {site.full_rank}, ({site.full_rank + 1},); "
            f"got shape {objective.shape}."
        )
    first = -(-min_rank // rank_multiple) * rank_multiple
    ranks = np.arange(first, site.full_rank + 1, rank_multiple, dtype=np.int64)
    whole = site_size(site, bytes_per_number)
    parts: list[Choices] = []
    for form in dict.fromkeys(forms):
        if form in ("narrow", "sparse"):  # a unit's, not a site's; and what needs moments, not a curve over ranks
            continue
        if form == "dense":
            parts.append(Choices.of([Choice("dense", site.full_rank, whole, 0.0)], whole=whole))
        elif len(ranks):
            loss = objective[ranks] * scale
            parts.append(_thin(site, form, ranks, loss, bytes_per_number, index_bytes, whole))
    if not parts:
        raise InputError(
            f"{site.name}: no rank from {min_rank} to {site.full_rank} is a multiple of {rank_multiple}, and "
            f"dense is not among its forms {list(forms)}. Allow dense, or exclude the site."
        )
    return Choices.joined(parts)


def unit_choices(
    unit: Unit,
    errors: ArrayLike,
    *,
    multiple: int = 1,
    min_width: int = 1,
    bytes_per_number: int = 4,
    index_bytes: int = INDEX_BYTES,
) -> Choices:
    """The widths that a unit may have, its full one included: as dense maps with fewer rows or columns.

    ``errors`` (full_rank + 1,) is the predicted rise of the loss at width 0 … full. Widths are multiples of
    ``multiple`` and of the unit's own step. Raises InputError for errors of another length.
    """
    objective = np.asarray(errors, np.float64)
    if objective.shape != (unit.full_rank + 1,):
        raise InputError(f"{unit.name}: expected errors at width 0 … {unit.full_rank}; got shape {objective.shape}.")
    step = int(np.lcm(multiple, unit.step))
    first = max(-(-min_width // step) * step, step)
    widths = np.arange(first, unit.full_rank, step, dtype=np.int64)
    whole = unit.width_parameters * unit.full_rank
    size = Size(parameters=whole, bytes=whole * bytes_per_number, macs=whole)
    numbers = widths * unit.width_parameters
    narrow = Choices(
        np.full_like(widths, FORMS.index("narrow")),
        widths,
        numbers,
        numbers * bytes_per_number + widths * unit.width_indices * index_bytes,
        numbers,
        objective[widths],
        whole=size,
    )
    dense = Choices.of([Choice("dense", unit.full_rank, size, 0.0)], whole=size)
    return Choices.joined([narrow, dense])


def with_bits(
    choices: Choices, bits: int, noise: NDArray[np.float64], bytes: NDArray[np.int64], repair: int = 0, numbers: int = 0
) -> Choices:
    """``choices`` with their numbers stored in ``bits`` bits: ``bytes`` in all, and ``noise`` more loss.

    ``repair`` is the rank of a correction beside each of them, which adds ``numbers`` parameters.
    """
    form, rank, parameters, _, macs, loss, _, _ = choices.columns()
    full = np.full_like(rank, bits), np.full_like(rank, repair)
    return Choices(form, rank, parameters + numbers, bytes, macs + numbers, loss + noise, *full, whole=choices.whole)


def quantised_bytes(rows: ArrayLike, columns: ArrayLike, bits: int, group: int, bytes_per_number: int) -> Any:
    """Bytes of matrices of these shapes on an integer grid: packed codes, and a scale and a zero per group."""
    m, n = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    groups = -(-n // group)
    return m * (-(-n * bits // 8) + groups * bytes_per_number + -(-groups * bits // 8))


def _thin(
    site: Site,
    form: FormKind,
    k: NDArray[np.int64],
    loss: NDArray[np.float64],
    bytes_per_number: int,
    index_bytes: int,
    whole: Size,
) -> Choices:
    m, n = site.out_features, site.in_features
    saved = k * k if form == "pivoted" else np.zeros_like(k)
    one = k * (m + n) - saved
    if site.kind == "embedding":
        lookup = one - k * n
        macs = lookup + one if site.tied else lookup
    else:
        macs = (1 + len(site.tied)) * one
    indices = m * index_bytes if form == "pivoted" else 0
    return Choices(
        np.full_like(k, FORMS.index(form)),
        k,
        site.slices * one,
        site.slices * (one * bytes_per_number + indices),
        site.slices * macs,
        loss,
        whole=whole,
    )
