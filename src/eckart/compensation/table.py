"""Every compensation method by name. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from eckart.compensation import eora, kfac, qera, svd
from eckart.compensation.method import CompensateMethod
from eckart.errors import InputError, problems, unknown

COMPENSATIONS: dict[str, CompensateMethod] = {
    method.name: method for method in (kfac.METHOD, eora.METHOD, qera.METHOD, svd.METHOD)
}
"""In the order in which they are shown: the default first, then by what they know."""


def get_compensation(name: str) -> CompensateMethod:
    """The method called ``name``; InputError with the nearest names where there is none."""
    if name not in COMPENSATIONS:
        raise InputError(unknown("compensation method", name, COMPENSATIONS))
    return COMPENSATIONS[name]


def compensation_options(method: CompensateMethod, given: Mapping[str, Any] | None = None) -> Any:
    """The method's options with ``given`` in place of its defaults.

    Raises InputError that names every option the method does not have, or the first value out of range.
    """
    known = [field.name for field in fields(method.options)]
    wrong = [unknown("option", name, known) for name in given or {} if name not in known]
    if wrong:
        raise InputError(problems(f"compensation method {method.name!r}", wrong))
    return method.options(**(given or {}))
