"""Drawings of the report as SVG, made here and not in the browser; classes of the style sheet colour them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from eckart.records import Interval
from eckart.report.palette import STEPS

ERROR_FLOOR = 1e-3
"""Relative errors below this lie on the lower edge of a drawing."""

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


def thinned(errors: Sequence[float], points: int) -> Sequence[float]:
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
    """Whole coordinates and relative steps: five bytes a point."""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    last = max(1, len(errors) - 1)
    points = [(round(_LEFT + width * i / last), round(_TOP + height * _height(e))) for i, e in enumerate(errors)]
    steps = [f"M{points[0][0]} {points[0][1]}"] if points else []
    if len(points) > 1:
        pairs = pairwise(points)
        steps.append("l" + " ".join(f"{x1 - x0} {y1 - y0}" for (x0, y0), (x1, y1) in pairs))
    return "".join(steps)


def _height(error: float) -> float:
    """0 at a relative error of 1, 1 at ERROR_FLOOR and below."""
    if not error > ERROR_FLOOR:
        return 1.0
    return min(1.0, max(0.0, math.log(error) / math.log(ERROR_FLOOR)))


def _colour(place: float) -> int:
    """The pale end of the ramp is left out: thin lines in it would not be seen."""
    first = STEPS // 3
    return first + round(place * (STEPS - 1 - first))
