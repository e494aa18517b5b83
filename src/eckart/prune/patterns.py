"""Which weights may stay together: from scores to masks, with exact counts.

Scores are (…, out, in), the higher the longer a weight stays; a convolution's or an expert stack's come from
:func:`eckart.linalg.matricize`. A mask is a bool tensor of the same shape, true where the weight stays.
Counts are exact and met from below: ⌊keep · n⌋ of n. Where scores tie, the lower index stays, so the same scores give
the same mask everywhere. Infinite scores are allowed (+inf stays before all others); NaN is not.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import BudgetError, InputError, NotFiniteError, problems, unknown

KNOWN = ("unstructured", "row", "2:4", "keep 2 of 8", "runs of 16", "outputs", "inputs")
"""Every kind of pattern in words, with example numbers."""


def check_keep(keep: object, what: str = "keep") -> float:
    """``keep`` as a float. Raises InputError unless it is a share in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        hint = " A map without weights does nothing: drop the layer instead." if keep == 0 else ""
        raise InputError(f"{what} is the share of weights that stay, in (0, 1]; got {keep!r}.{hint}")
    return float(keep)


def count(keep: float, n: int) -> int:
    """⌊keep · n⌋, unharmed by the rounding of the product: 0.1 of 30 is 3."""
    return min(n, math.floor(keep * n * (1 + 1e-12) + 1e-9))


def highest(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest along the last dimension; the lower index wins a tie. Cost: one selection, O(n).

    ``scores`` (…, n) without NaN, 0 ≤ k ≤ n.
    """
    n = scores.shape[-1]
    if k >= n or k <= 0:
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    edge = scores.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, at = scores > edge, scores == edge
    room = k - above.sum(-1, keepdim=True)
    return above | (at & (at.cumsum(-1) <= room))


class Pattern(ABC):
    """A rule on which weights stay. :func:`parse_pattern` makes one from words."""

    local: bool = False
    """Whether every row or group has a count of its own, so that no budget can be shared between layers."""

    @property
    def share(self) -> float | None:
        """The share of weights that the pattern keeps by itself; None where it takes any."""
        return None

    @abstractmethod
    def unfit(self, shape: tuple[int, ...]) -> str | None:
        """Why weights of this shape (…, out, in) cannot have the pattern; None where they can."""

    @abstractmethod
    def units(self, values: Tensor) -> Tensor:
        """Sums of ``values`` (…, out, in) over the weights that stay or go together."""

    @abstractmethod
    def spread(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mask of ``shape`` from one bool per unit, shaped as :meth:`units` gives them."""

    @abstractmethod
    def choose(self, units: Tensor, keep: float | None) -> Tensor:
        """One bool per unit, from scores of units. Raises BudgetError where less than one would stay."""

    def at(self, keep: float) -> Pattern:
        """The pattern on the way to its end, with a share ``keep`` of the weights left: itself, save for N:M."""
        return self

    def mask(self, scores: Tensor, keep: float | None = None) -> Tensor:
        """The bool mask (…, out, in) that keeps a share ``keep`` of the weights, those of the highest scores.

        ``keep`` in (0, 1]; "keep n of m" has its share in itself, and takes None or that share. The score of a unit
        of several weights is the sum of theirs. Raises InputError for a shape that does not fit or a share out of
        range, NotFiniteError for NaN, BudgetError where ``keep`` leaves nothing. Cost: O(n).
        """
        if (reason := self.unfit(tuple(scores.shape))) is not None:
            raise InputError(f"pattern {self}: {reason}.")
        if bool(scores.isnan().any()):
            raise NotFiniteError(f"pattern {self}: the scores hold NaN.")
        return self.spread(self.choose(self.units(scores), keep), tuple(scores.shape))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight of the tensor may stay."""

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        return f"no weights in shape {shape}" if 0 in shape else None

    def units(self, values: Tensor) -> Tensor:
        return values

    def spread(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        return chosen

    def choose(self, units: Tensor, keep: float | None) -> Tensor:
        k = _at_least_one(self, keep, units.numel(), "weights")
        return highest(units.reshape(-1), k).reshape(units.shape)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Row(Pattern):
    """Every row (one output) keeps the same number of its weights, as Wanda does."""

    local = True

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) >= 2 and 0 not in shape else f"needs rows (…, out, in); got shape {shape}"

    def units(self, values: Tensor) -> Tensor:
        return values

    def spread(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        return chosen

    def choose(self, units: Tensor, keep: float | None) -> Tensor:
        return highest(units, _at_least_one(self, keep, units.shape[-1], "weights in a row"))

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class NofM(Pattern):
    """Of every ``of`` consecutive inputs of a row, ``keep`` stay. 2:4 is keep 2 of 4.

    Papers disagree: the scripts of Wanda and SparseGPT count the weights that go. Here it is always those that stay.
    """

    keep: int
    of: int

    local = True

    def __post_init__(self) -> None:
        for n in (self.keep, self.of):
            if not isinstance(n, int) or isinstance(n, bool):
                raise InputError(f"NofM(keep, of) takes two ints; got {self.keep!r}, {self.of!r}.")
        if not 1 <= self.keep <= self.of:
            raise InputError(f"keep n of m needs 1 ≤ n ≤ m; got keep {self.keep} of {self.of}.")

    @property
    def share(self) -> float:
        return self.keep / self.of

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < 2 or 0 in shape:
            return f"needs rows (…, out, in); got shape {shape}"
        return f"{shape[-1]} inputs are no multiple of {self.of}" if shape[-1] % self.of else None

    def units(self, values: Tensor) -> Tensor:
        return values

    def spread(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        return chosen

    def choose(self, units: Tensor, keep: float | None) -> Tensor:
        if keep is not None and not math.isclose(keep, self.share):
            raise InputError(f"pattern {self} keeps {self.share:g} of the weights; got keep={keep!r}.")
        return highest(units.reshape(*units.shape[:-1], -1, self.of), self.keep).flatten(-2)

    def at(self, keep: float) -> NofM:
        """The densest "keep k of m" that keeps no more than this share, but at least its own n."""
        return NofM(max(self.keep, count(check_keep(keep), self.of)), self.of)

    def __str__(self) -> str:
        return f"keep {self.keep} of {self.of}"


@dataclass(frozen=True)
class Runs(Pattern):
    """Runs of ``size`` consecutive inputs of a row stay or go as one."""

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise InputError(f"runs have a size of at least 1; got {self.size!r}.")

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) < 2 or 0 in shape:
            return f"needs rows (…, out, in); got shape {shape}"
        return f"{shape[-1]} inputs are no multiple of {self.size}" if shape[-1] % self.size else None

    def units(self, values: Tensor) -> Tensor:
        return values.reshape(*values.shape[:-1], -1, self.size).sum(-1)

    def spread(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        return chosen.repeat_interleave(self.size, dim=-1)

    def choose(self, units: Tensor, keep: float | None) -> Tensor:
        k = _at_least_one(self, keep, units.numel(), "runs")
        return highest(units.reshape(-1), k).reshape(units.shape)

    def __str__(self) -> str:
        return f"runs of {self.size}"


@dataclass(frozen=True)
class Whole(Pattern):
    """Whole outputs (rows, filters) or whole inputs (columns) stay or go; over all slices of a stack at once."""

    outputs: bool = True

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) >= 2 and 0 not in shape else f"needs rows (…, out, in); got shape {shape}"

    def units(self, values: Tensor) -> Tensor:
        if self.outputs:
            return values.sum(-1)
        return values.flatten(0, -2).sum(0)

    def spread(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (chosen.unsqueeze(-1) if self.outputs else chosen).expand(shape).contiguous()

    def choose(self, units: Tensor, keep: float | None) -> Tensor:
        k = _at_least_one(self, keep, units.numel(), str(self))
        return highest(units.reshape(-1), k).reshape(units.shape)

    def __str__(self) -> str:
        return "outputs" if self.outputs else "inputs"


def parse_pattern(words: str | Pattern) -> Pattern:
    """``unstructured``, ``row``, ``2:4`` (keep 2 of 4), ``keep 2 of 8``, ``runs of 16``, ``outputs``, ``inputs``.

    A Pattern is given back as it is. Raises InputError for other words.
    """
    if isinstance(words, Pattern):
        return words
    if not isinstance(words, str):
        raise InputError(f"a pattern is given in words, such as {KNOWN[0]!r} or {KNOWN[3]!r}; got {words!r}.")
    text = " ".join(words.lower().split())
    if found := re.fullmatch(r"(\d+) ?: ?(\d+)|(?:keep )?(\d+) of (\d+)", text):
        n, m = (int(g) for g in found.groups() if g is not None)
        return NofM(n, m)
    if found := re.fullmatch(r"runs of (\d+)", text):
        return Runs(int(found.group(1)))
    simple = {"unstructured": Unstructured(), "row": Row(), "outputs": Whole(True), "inputs": Whole(False)}
    if text not in simple:
        raise InputError(unknown("pattern", words, KNOWN))
    return simple[text]


def check_fits(pattern: Pattern, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError that names every layer whose shape (…, out, in) the pattern does not fit."""
    wrong = [f"{name}: {reason}" for name, shape in shapes.items() if (reason := pattern.unfit(shape)) is not None]
    if wrong:
        raise InputError(problems(f"pattern {pattern} does not fit these layers; exclude them", wrong))


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raises NotFiniteError that names every layer with NaN among its scores."""
    wrong = [f"{name}: {bad} of {s.numel()} are NaN" for name, s in scores.items() if (bad := int(s.isnan().sum()))]
    if wrong:
        raise NotFiniteError(problems("scores", wrong))


def global_choice(
    units: Mapping[str, Tensor], sizes: Mapping[str, int], keep: float, floor: int = 0
) -> dict[str, Tensor]:
    """One bool per unit under one budget over all layers: ⌊keep · N⌋ of all N weights.

    ``units``: scores, any shape per layer; ``sizes``: weights in one unit of that layer. ``floor``: so many weights of
    every layer stay at least, those of its highest scores; a layer with no more than that stays whole. Among units of
    equal score the earlier layer, then the lower index, stays. Units of several sizes are taken in order of their score
    until one does not fit. Raises BudgetError where the floors take more than the budget.
    """
    total = sum(units[name].numel() * sizes[name] for name in units)
    budget = count(keep, total)
    protected = {
        name: highest(score.reshape(-1), min(score.numel(), math.ceil(floor / sizes[name])))
        for name, score in units.items()
    }
    held = sum(int(mask.sum()) * sizes[name] for name, mask in protected.items())
    if held > budget or budget == 0:
        least = max(held, 1) / total
        raise BudgetError(
            f"keep={keep:g} leaves {budget:,} of {total:,} weights, and the floors of {len(units)} layers take "
            f"{held:,}. Take a keep of at least {math.ceil(least * 1e6) / 1e6:g}, or a lower floor."
        )
    if not units:
        return {}
    device, dtype = next(iter(units.values())).device, torch.float32
    for score in units.values():
        dtype = torch.promote_types(dtype, score.dtype)
    parts = [s.reshape(-1).to(dtype).masked_fill(protected[n], torch.inf).to(device) for n, s in units.items()]
    flat = torch.cat(parts)
    if len(set(sizes.values())) == 1:
        chosen = highest(flat, budget // next(iter(sizes.values())))
    else:
        cost = torch.cat([torch.full((s.numel(),), sizes[n], device=device) for n, s in units.items()])
        order = flat.sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[order] = cost[order].cumsum(0) <= budget
    split = torch.split(chosen, [s.numel() for s in units.values()])
    return {n: part.reshape(s.shape).to(s.device) for (n, s), part in zip(units.items(), split, strict=True)}


def global_masks(
    scores: Mapping[str, Tensor], keep: float, pattern: str | Pattern = "unstructured", *, floor: int = 0
) -> dict[str, Tensor]:
    """Masks of all layers under one budget: a share ``keep`` of all their weights stays, whichever layer they are in.

    ``scores``: (…, out, in) by layer, comparable between layers; the score of a unit of several weights is the mean
    of theirs. ``floor``: weights that every layer keeps at least. Raises InputError for patterns with a count per row,
    which have no budget to share, and as ``check_fits``, ``check_scores`` and ``global_choice`` do.
    """
    pattern, keep = parse_pattern(pattern), check_keep(keep)
    if pattern.local:
        raise InputError(f"pattern {pattern} has a count in every row; a budget over all layers has nothing to share.")
    shapes = {name: tuple(s.shape) for name, s in scores.items()}
    check_fits(pattern, shapes)
    check_scores(scores)
    units = {name: pattern.units(s) for name, s in scores.items()}
    sizes = {name: math.prod(shapes[name]) // units[name].numel() for name in units}
    means = {name: u / sizes[name] if sizes[name] > 1 else u for name, u in units.items()}
    chosen = global_choice(means, sizes, keep, floor)
    return {name: pattern.spread(chosen[name], shapes[name]) for name in scores}


def _at_least_one(pattern: Pattern, keep: float | None, n: int, what: str) -> int:
    if keep is None:
        raise InputError(f"pattern {pattern} needs keep, the share of weights that stay.")
    k = count(check_keep(keep), n)
    if k == 0:
        raise BudgetError(
            f"pattern {pattern}: keep={keep:g} of {n} {what} is less than one. "
            f"The least is {math.ceil(1e6 / n) / 1e6:g}."
        )
    return k
