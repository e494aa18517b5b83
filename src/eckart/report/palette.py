"""One sequential ramp of colours, computed: lightness falls evenly, so it reads without telling hues apart.

Colours are interpolated in OKLab (Björn Ottosson, “A perceptual color space for image processing”, 2020,
https://bottosson.github.io/posts/oklab/), where equal steps of L look equally large.
"""

from __future__ import annotations

import math

STEPS = 10
"""Colours of the ramp; a share in [0, 1] falls into one of as many classes."""

_ANCHORS = (
    (0.955, 0.045, 105.0),
    (0.86, 0.085, 160.0),
    (0.68, 0.100, 205.0),
    (0.47, 0.105, 250.0),
    (0.29, 0.095, 285.0),
)
"""(lightness, chroma, hue in degrees): straw, green, sea, blue, indigo. Lightness never rises."""


def step(share: float) -> int:
    """The class, 0 … STEPS − 1, of a share in [0, 1]."""
    return min(STEPS - 1, max(0, int(share * STEPS)))


def ramp() -> tuple[str, ...]:
    """STEPS colours ``#rrggbb`` from pale to deep."""
    return tuple(_hex(_rgb(*_at(i / (STEPS - 1)))) for i in range(STEPS))


def ink_on(colour: str) -> str:
    """Near-black or white, whichever can be read better on ``colour``."""
    return max(("#10131c", "#ffffff"), key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, 1 … 21, as the WCAG 2 defines it; text wants 4.5."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def style_sheet() -> str:
    """Custom properties ``--s0 … --s9`` (fill) and ``--t0 … --t9`` (text on it) for light and for dark.

    In both, the more is kept the further a colour stands out from the page, so dark reverses the ramp.
    """
    light = _properties(ramp())
    dark = _properties(tuple(reversed(ramp())))
    classes = "".join(
        f".s{i}{{background:var(--s{i});color:var(--t{i})}}.l{i}{{stroke:var(--s{i})}}.f{i}{{fill:var(--s{i})}}"
        for i in range(STEPS)
    )
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}"


def _properties(colours: tuple[str, ...]) -> str:
    return "".join(f"--s{i}:{c};--t{i}:{ink_on(c)};" for i, c in enumerate(colours))


def _at(t: float) -> tuple[float, float, float]:
    """OKLab point at t in [0, 1] of the straight lines through the anchors."""
    points = [(L, C * math.cos(math.radians(h)), C * math.sin(math.radians(h))) for L, C, h in _ANCHORS]
    place = t * (len(points) - 1)
    i = min(int(place), len(points) - 2)
    u = place - i
    L, a, b = (p + u * (q - p) for p, q in zip(points[i], points[i + 1], strict=True))
    return L, a, b


def _rgb(L: float, a: float, b: float) -> tuple[float, float, float]:
    """OKLab to linear sRGB; the matrices are Ottosson's."""
    l, m, s = (
        (L + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (L - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (L - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    return (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )


def _hex(linear: tuple[float, float, float]) -> str:
    def encode(c: float) -> int:
        c = min(1.0, max(0.0, c))
        return round(255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055))

    return "#" + "".join(f"{encode(c):02x}" for c in linear)


def _luminance(colour: str) -> float:
    def decode(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    r, g, b = (decode(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
