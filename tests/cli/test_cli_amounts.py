"""Numbers as people write them."""

from __future__ import annotations

import pytest

from eckart.cli.amounts import parse_bytes, parse_count, parse_pair, parse_scalar


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("40MB", 40_000_000),
        ("40 mb", 40_000_000),
        ("8GiB", 8 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("1_000", 1000),
        ("12B", 12),
        ("2e6", 2_000_000),
        ("3KiB", 3072),
        (512, 512),
        (1e3, 1000),
    ],
)
def test_bytes(text, bytes_):
    assert parse_bytes(text) == bytes_


@pytest.mark.parametrize(("text", "count"), [("15M", 15 * 10**6), ("7B", 7 * 10**9), ("300k", 300_000), (4, 4)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["40QB", "MB", "", "-3MB", "0", "0.2", "1..5MB", "inf", "nan", True, None, [1]])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="40MB"):
        parse_bytes(text)


def test_scalars_are_yaml_and_know_exponents_without_a_point():
    assert parse_scalar("1e-3") == 1e-3
    assert parse_scalar("0.5") == 0.5
    assert parse_scalar("true") is True
    assert parse_scalar("null") is None
    assert parse_scalar("[a, 2]") == ["a", 2]
    assert parse_scalar("v1beta") == "v1beta"
    assert parse_scalar("nan") == "nan"


def test_pairs():
    assert parse_pair("rho=1e-2") == ("rho", 0.01)
    assert parse_pair("a.b=x=y") == ("a.b", "x=y")
    for bad in ("rho", "=3", "a=[1"):
        with pytest.raises(ValueError):
            parse_pair(bad)
