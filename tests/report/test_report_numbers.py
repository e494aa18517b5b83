"""How numbers are written, and that colours can be told apart and read."""

from __future__ import annotations

import math

import pytest

from eckart.records import Interval
from eckart.report import format as fmt
from eckart.report import palette, sample_curve


def plain(text: str) -> str:
    return text.replace(fmt.SPACE, " ")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (384, "384"), (9_216, "9,216"), (9_999, "9,999"), (10_000, "10.0 k"), (999_499, "999 k"),
     (999_600, "1.00 M"), (22_713_216, "22.7 M"), (6_738_415_616, "6.74 G")],
)  # fmt: skip
def test_count(n: int, text: str) -> None:
    assert plain(fmt.count(n)) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.00 kB"), (90_868_376, "90.9 MB"), (13.5e9, "13.5 GB")],
)
def test_human_bytes(n: float, text: str) -> None:
    assert plain(fmt.human_bytes(n)) == text


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [(None, 3, "–"), (0.0, 3, "0"), (0.0412, 3, "0.0412"), (1.77, 3, "1.77"), (4.13e-5, 3, "4.1e-5"),
     (-0.5, 3, "-0.500"), (123456.7, 3, "123457"), (math.nan, 3, "not finite"), (math.inf, 3, "not finite")],
)  # fmt: skip
def test_figure(x: float | None, digits: int, text: str) -> None:
    assert fmt.figure(x, digits) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [(8.2e-5, "82.0 µs"), (0.0032, "3.20 ms"), (41.3, "41.3 s"), (125, "2 min 05 s"), (4320, "1 h 12 min")],
)
def test_seconds(s: float, text: str) -> None:
    assert plain(fmt.seconds(s)) == text


def test_shares_and_ratios() -> None:
    assert plain(fmt.share(0.6)) == "60.0 %"
    assert plain(fmt.percent(0.00097)) == "0.097 %"
    assert fmt.times(1.4199) == "1.42×"
    assert fmt.times(math.inf) == "–"
    assert fmt.speed(1.01) == "as fast as before"
    assert fmt.speed(0.8) == "0.80× as fast"


def test_a_mean_has_the_decimals_that_its_interval_can_carry() -> None:
    found = Interval(mean=0.93241, low=0.9289, high=0.9357, n=300)
    assert (fmt.mean(found), fmt.interval(found)) == ("0.9324", "0.9289 to 0.9357")
    wide = Interval(mean=1.7712, low=1.2, high=2.4, n=5)
    assert (fmt.mean(wide), fmt.interval(wide)) == ("1.77", "1.20 to 2.40")
    assert fmt.mean(Interval(mean=1.0, low=1.0, high=1.0, n=5)) == "1.000"


def test_long_names_are_cut_in_the_middle() -> None:
    name = "model.decoder.layers.11.encoder_attn.k_proj_with_a_long_name"
    cut = fmt.middle(name, 30)
    assert len(cut) == 30
    assert cut.startswith(name[:9])
    assert cut.endswith(name[-20:])
    assert fmt.middle("short", 30) == "short"


def test_lightness_of_the_ramp_falls_and_text_on_it_can_be_read() -> None:
    colours = palette.ramp()
    to_white = [palette.contrast(c, "#ffffff") for c in colours]
    assert to_white == sorted(to_white)
    assert len(set(colours)) == palette.STEPS
    assert min(palette.contrast(c, palette.ink_on(c)) for c in colours) >= 4.5


def test_contrast_is_that_of_the_wcag() -> None:
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(("share", "step"), [(-0.1, 0), (0, 0), (0.05, 0), (0.62, 6), (1, 9), (1.3, 9)])
def test_steps_of_the_ramp(share: float, step: int) -> None:
    assert palette.step(share) == step


def test_sampled_curves_keep_both_ends() -> None:
    errors = [float((384 - k) ** 2) for k in range(385)]
    sampled = sample_curve(errors, 32)
    assert len(sampled) == 32
    assert (sampled[0], sampled[-1]) == (1.0, 0.0)
    assert sampled == sorted(sampled, reverse=True)
    assert sample_curve([4.0, 1.0, -1e-18], 32) == [1.0, 0.25, 0.0]
    assert sample_curve([0.0, 0.0]) == [0.0, 0.0]
