"""How numbers are written: in the report, the model card and the terminal alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from eckart.records import Interval

SPACE: Final = "\u00a0"
"""Between a number and its unit, so that no line breaks there."""
Show = Callable[[float], str]
"""How one kind of number is written."""
NONE: Final = "–"
"""Stands where there is no figure."""


def count(n: float) -> str:
    """``384``, ``9,216``, ``22.7 M``: exact below ten thousand, three digits above."""
    if abs(n) < 10_000:
        return f"{n:,.0f}"
    return _scaled(n, ("", "k", "M", "G", "T", "P"))


def human_bytes(n: float) -> str:
    """``43.6 MB``; a MB is 10⁶ bytes, as on disks."""
    return _scaled(n, ("B", "kB", "MB", "GB", "TB", "PB"))


def share(x: float) -> str:
    """``60.0 %`` for 0.6."""
    return f"{100 * x:.1f}{SPACE}%" if math.isfinite(x) else NONE


def figure(x: float | None, digits: int = 3) -> str:
    """``digits`` significant digits: ``0.0412``, ``1.77``, ``4.1e-5``; no figure for None."""
    if x is None:
        return NONE
    if not math.isfinite(x):
        return "not finite"
    if x == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{x:.{digits}g}"))))
    if -4 <= exponent < 6:
        return f"{x:.{max(0, digits - 1 - exponent)}f}"
    mantissa, _, power = f"{x:.{max(1, digits - 2)}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def percent(x: float | None) -> str:
    """``0.097 %`` for 0.00097: two digits, however small; no figure for None."""
    if x is None:
        return NONE
    return f"{figure(100 * x, 2)}{SPACE}%" if math.isfinite(x) else figure(x)


def interval(i: Interval) -> str:
    """``0.928 to 0.936``, both ends with as many decimals as their distance asks for."""
    places = decimals(i)
    return f"{i.low:.{places}f} to {i.high:.{places}f}"


def mean(i: Interval) -> str:
    """The mean with as many decimals as its interval can carry."""
    return f"{i.mean:.{decimals(i)}f}"


def decimals(i: Interval) -> int:
    """Two digits of the interval's width are shown, between 2 and 5 decimals."""
    width = i.high - i.low
    if not (math.isfinite(width) and width > 0):
        return 3
    return min(5, max(2, 1 - math.floor(math.log10(width))))


def seconds(s: float) -> str:
    """``840 µs``, ``3.2 ms``, ``41 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if s < 1e-3:
        return f"{_digits(s * 1e6)}{SPACE}µs"
    if s < 1:
        return f"{_digits(s * 1e3)}{SPACE}ms"
    if s < 60:
        return f"{_digits(s)}{SPACE}s"
    whole = round(s)
    if whole < 3600:
        return f"{whole // 60}{SPACE}min{SPACE}{whole % 60:02d}{SPACE}s"
    return f"{whole // 3600}{SPACE}h{SPACE}{whole % 3600 // 60:02d}{SPACE}min"


def times(x: float) -> str:
    """``1.42×``."""
    return f"{x:.2f}×" if math.isfinite(x) else NONE


def speed(speedup: float) -> str:
    """``1.42× as fast``; anything within 2 % reads ``as fast as before``."""
    return "as fast as before" if abs(speedup - 1) < 0.02 else f"{times(speedup)} as fast"


def middle(name: str, width: int = 44) -> str:
    """``name`` cut in its middle to at most ``width`` characters; the end, which tells more, keeps more."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[-(width - 1 - head) :]}"


def sentence(text: str) -> str:
    """``text`` with a capital in front and a full stop behind; empty stays empty."""
    end = "" if not text or text[-1] in ".!?" else "."
    return f"{text[:1].upper()}{text[1:]}{end}"


def code_parts(text: str) -> tuple[tuple[str, bool], ...]:
    """``text`` cut at its backticks: (part, whether it is code)."""
    return tuple((part, bool(i % 2)) for i, part in enumerate(text.split("`")) if part)


def _scaled(n: float, units: tuple[str, ...]) -> str:
    size = float(n)
    power = 0
    # 999.5 would be written as 1000 of the smaller unit.
    while abs(size) >= 999.5 and power + 1 < len(units):
        size /= 1000
        power += 1
    text = f"{size:.0f}" if power == 0 else _digits(size)
    return f"{text}{SPACE}{units[power]}".rstrip()


def _digits(x: float) -> str:
    """Three significant digits without an exponent."""
    if x == 0:
        return "0"
    x = float(f"{x:.3g}")  # so that 0.9996 counts as 1.00 and not as a number below 1
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"
