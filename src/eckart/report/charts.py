"""Drawings of the report as SVG, made here and not in the browser; classes of the style sheet colour them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from markupsafe import Markup, escape

from eckart.records import Interval
from eckart.report.palette import STEPS

ERROR_FLOOR = 1e-3
"""Relative errors below this lie on the lower edge of a drawing."""

Number = TypeVar("Number", int, float)
_WIDTH, _HEIGHT = 264, 168
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 8, 24


@dataclass(frozen=True, kw_only=True)
class Line:
    """The error curve of one layer."""

    index: int
    """Row of the layer, which the script uses to find the line."""
    errors: Sequence[float]
    """Relative error at ranks spaced evenly from 0 to the full rank."""
    chosen: tuple[float, float] | None
    """(share of the full rank, relative error) of what was chosen; None where the layer stays dense."""
    place: float
    """0 for the first block, 1 for the last: picks the colour."""


def sample_curve(errors: Sequence[float], points: int = 32) -> list[float]:
    """Relative errors at ``points`` ranks spaced evenly from 0 to the full rank.

    ``errors`` holds the objective at rank 0 … r, so errors[0] is the error of dropping the matrix. A curve
    of no more than ``points`` ranks comes back whole; one of a zero matrix is all zeros.
    """
    total = float(errors[0])
    last = len(errors) - 1
    picked = range(last + 1) if last < points else (round(i * last / (points - 1)) for i in range(points))
    return [max(0.0, float(errors[k])) / total if total > 0 else 0.0 for k in picked]


def thinned(errors: Sequence[Number], points: int) -> Sequence[Number]:
    """At most ``points`` of the given ones, spaced evenly, both ends kept."""
    last = len(errors) - 1
    if last < points:
        return errors
    return [errors[round(i * last / (points - 1))] for i in range(points)]


def curves(lines: Sequence[Line], label: str) -> Markup:
    """Error against the share of the full rank, on a logarithmic scale, one line per layer."""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    decades = -round(math.log10(ERROR_FLOOR))
    for i in range(decades + 1):
        y = _TOP + height * i / decades
        text = ("100", "10", "1", "0.1")[i]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.0f}h{width}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.0f}" text-anchor="end">{text}</text>')
    for x, text, anchor in ((0, "0", "start"), (0.5, "½", "middle"), (1, "full rank", "end")):
        parts.append(f'<text x="{_LEFT + x * width:.0f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{text}</text>')
    for line in lines:
        parts.append(f'<path class="line l{_colour(line.place)}" data-i="{line.index}" d="{_path(line.errors)}"/>')
    for line in lines:
        if line.chosen:
            x, y = _LEFT + line.chosen[0] * width, _TOP + _height(line.chosen[1]) * height
            where = f'cx="{x:.1f}" cy="{y:.1f}" r="3.2"'
            parts.append(f'<circle class="dot f{_colour(line.place)}" data-i="{line.index}" {where}/>')
    parts.append("</svg>")
    return Markup("".join(parts))


def whisker(value: Interval, same: float) -> Markup:
    """A mean and its interval between a round bad value and that of a model equal to the original."""
    worst = _worst(value, same)

    def at(v: float) -> float:
        return min(1.0, max(0.0, (v - worst) / (same - worst)))

    low, high = sorted((at(value.low), at(value.high)))
    parts = [
        '<svg class="whisker" viewBox="0 0 200 14" aria-hidden="true">',
        '<path class="grid" d="M6 7h188"/><path class="tick" d="M194 1v12"/>',
        f'<path class="range" d="M{6 + 188 * low:.1f} 7H{6 + 188 * high:.1f}"/>',
        f'<circle class="point" cx="{6 + 188 * at(value.mean):.1f}" cy="7" r="4.5"/></svg>',
        f'<p class="ends" aria-hidden="true"><span>{worst:g}</span><span>{same:g} = original</span></p>',
    ]
    return Markup("".join(parts))


def _worst(value: Interval, same: float) -> float:
    """The round figure that the far end of the scale carries."""
    far = max(abs(v - same) for v in (value.mean, value.low, value.high))
    if same == 1:
        return next((w for w in (0.9, 0.5, 0.0, -1.0) if 1 - w >= far), -1.0)
    if far == 0:
        return same + 1
    power = 10.0 ** math.floor(math.log10(far))
    return same + next((m * power for m in (1, 2, 5) if m * power >= far), 10 * power)


def _path(errors: Sequence[float]) -> str:
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    last = max(1, len(errors) - 1)
    return _relative(
        [(round(_LEFT + width * i / last), round(_TOP + height * _height(e))) for i, e in enumerate(errors)]
    )


def _height(error: float) -> float:
    """0 at a relative error of 1, 1 at ERROR_FLOOR and below."""
    if not error > ERROR_FLOOR:
        return 1.0
    return min(1.0, max(0.0, math.log(error) / math.log(ERROR_FLOOR)))


def _colour(place: float) -> int:
    """The pale end of the ramp is left out: thin lines in it would not be seen."""
    first = STEPS // 3
    return first + round(place * (STEPS - 1 - first))


SPARK_DECADES = 2.0
"""Singular values below 1 % of the first lie on the lower edge of a sparkline."""


def sparkline(values: Sequence[float], places: Sequence[int], points: int = 24) -> Markup:
    """A spectrum at a glance: the logarithm of σ against the index, ``places`` being the indices of ``values``."""
    top, last = values[0], places[-1] or 1
    if not top > 0:
        return Markup()
    spots = []
    for i in thinned(range(len(values)), points):
        fall = min(SPARK_DECADES, -math.log10(values[i] / top)) if values[i] > 0 else SPARK_DECADES
        spots.append((round(144 * places[i] / last), round(2 + 32 * fall / SPARK_DECADES)))
    return Markup(f'<svg class="spark" viewBox="0 0 144 36" aria-hidden="true"><path d="{_relative(spots)}"/></svg>')


def plot(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, label: str) -> Markup:
    """Named lines of (x, y) with axes; an axis that spans more than 30 times its smallest value is logarithmic.

    Nothing is drawn of points that share one x.
    """
    lines = {name: [p for p in line if all(map(math.isfinite, p))] for name, line in curves.items()}
    everything = [point for line in lines.values() for point in line]
    if len({x for x, _ in everything}) < 2:
        return Markup()
    left, right, top, bottom = 64, 14, 10, 38
    across, down = Axis.of([p[0] for p in everything]), Axis.of([p[1] for p in everything])
    width, height = 560 - left - right, 260 - top - bottom
    parts = [f'<svg class="plot" viewBox="0 0 560 260" role="img" aria-label="{escape(label)}">']
    for tick in down.ticks():
        place = top + height * (1 - down.at(tick))
        parts.append(f'<path class="grid" d="M{left} {place:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in across.ticks():
        place = left + width * across.at(tick)
        parts.append(f'<text x="{place:.1f}" y="{top + height + 14}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="axis" x="{left + width / 2}" y="254" text-anchor="middle">{escape(x)}</text>')
    middle = top + height / 2
    turned = f'x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})"'
    parts.append(f'<text class="axis" {turned}>{escape(y)}</text>')
    for i, line in enumerate(lines.values()):
        spots = [(round(left + width * across.at(a)), round(top + height * (1 - down.at(b)))) for a, b in line]
        dash, colour = line_style(i)
        parts.append(f'<path class="line d{dash} l{colour}" d="{_relative(spots)}"/>')
        if len(spots) <= 40:
            dots = "".join(f'<circle cx="{a}" cy="{b}" r="2.6"/>' for a, b in spots)
            parts.append(f'<g class="f{colour}">{dots}</g>')
    return Markup("".join([*parts, "</svg>"]))


def line_style(i: int) -> tuple[int, int]:
    """Pattern (``.d0 … .d3`` of the style sheet) and colour of line ``i``: none is told by its colour alone."""
    return i % 4, (9, 5, 7, 4)[(i + i // 4) % 4]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale from ``low`` to ``high``."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Axis:
        """From the smallest to the largest value, widened to round figures; from zero where that is near."""
        low, high = min(values), max(values)
        if low > 0 and high / low > 30:
            return cls(low=low, high=high, log=True)
        if 0 < low < 0.5 * high:
            low = 0.0
        if low == high:
            low, high = low - 0.5, high + 0.5
        size = _nice((high - low) / 5)
        return cls(low=math.floor(low / size) * size, high=math.ceil(high / size - 1e-9) * size, log=False)

    def at(self, value: float) -> float:
        """0 … 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round figures within the scale."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
            found = [float(f"{m}e{p}") for p in powers for m in steps]
            return [tick for tick in found if self.low <= tick <= self.high]
        size = _nice((self.high - self.low) / 5)
        return [float(f"{size * k:.6g}") for k in range(round(self.low / size), round(self.high / size) + 1)]


def _nice(rough: float) -> float:
    """The round step, 1, 2 or 5 times a power of ten, next above ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _relative(points: Sequence[tuple[int, int]]) -> str:
    """Whole coordinates and relative steps: five bytes a point."""
    steps = [f"M{points[0][0]} {points[0][1]}"] if points else []
    if len(points) > 1:
        steps.append("l" + " ".join(f"{x1 - x0} {y1 - y0}" for (x0, y0), (x1, y1) in pairwise(points)))
    return "".join(steps)
