"""Numbers as people write them: ``40MB``, ``8GiB``, ``15M``, and scalars of ``name=value``."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_BYTES = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_AMOUNT = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(given: object) -> int:
    """Whole bytes of ``40MB`` (10⁶), ``8GiB`` (2³⁰), ``1.5 GB`` or a plain number.

    Raises ValueError where the unit is unknown, or where nothing would be left.
    """
    return _amount(given, _BYTES, "bytes, such as 40MB, 8GiB or 41943040")


def parse_count(given: object) -> int:
    """A whole number from ``15M``, ``2.5G``, ``7B``, ``300k`` or digits; units are powers of 1000."""
    return _amount(given, _COUNTS, "a count, such as 15M, 7B or 300000")


def parse_budget(given: object) -> dict[str, float | int]:
    """``0.5%`` as {"model_keep": 0.005}, ``300k`` as {"parameters": 300000}.

    Raises ValueError for anything else, such as a bare number below 1.
    """
    expected = "a share of the model such as 0.5%, or a count of parameters such as 300k"
    text = str(given).strip()
    if not text.endswith("%"):
        try:
            return {"parameters": parse_count(given)}
        except ValueError:
            raise ValueError(f"expected {expected}") from None
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        raise ValueError(f"expected {expected}") from None
    if not 0 < share <= 1:
        raise ValueError(f"expected {expected}, above 0 and at most 100%")
    return {"model_keep": share}


def _amount(given: object, units: dict[str, int], expected: str) -> int:
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise ValueError(f"expected {expected}")
    if isinstance(given, str):
        match = _AMOUNT.fullmatch(given)
        if match is None or match[2].lower() not in units:
            raise ValueError(f"expected {expected}")
        number = float(match[1].replace("_", "")) * units[match[2].lower()]
    else:
        number = given
    if not math.isfinite(number) or number < 1:
        raise ValueError(f"expected {expected}, at least 1")
    return int(number)


def parse_scalar(text: str) -> Any:
    """The value of ``name=value``: YAML, except that ``1e-3`` is a number too.

    Raises ValueError where ``text`` is no YAML.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a YAML value") from error
    if isinstance(value, str):
        try:
            return float(value) if any(c.isdigit() for c in value) else value
        except ValueError:
            return value
    return value


def parse_pair(text: str) -> tuple[str, Any]:
    """``name=value`` as (name, value). Raises ValueError where there is no name or no ``=``."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"expected name=value; got {text!r}")
    return name.strip(), parse_scalar(value)
