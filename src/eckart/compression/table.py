"""Every compression method by name. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

from eckart.compression import afm, asvd, fwsvd, kfac, lord, svd, whitened
from eckart.compression.method import CompressMethod
from eckart.errors import InputError, problems, unknown

METHODS: dict[str, CompressMethod] = {
    method.name: method
    for method in (
        kfac.METHOD,
        whitened.METHOD,
        afm.METHOD,
        lord.METHOD,
        asvd.METHOD,
        fwsvd.METHOD,
        svd.METHOD,
    )
}
"""In the order in which they are shown: the default first, then by what they know."""


def get_method(name: str) -> CompressMethod:
    """The method called ``name``; InputError with the nearest names where there is none."""
    if name not in METHODS:
        raise InputError(unknown("method", name, METHODS))
    return METHODS[name]


class HasOptions(Protocol):
    """A method of any table."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> type[Any]: ...


def options_for(method: HasOptions, given: Mapping[str, Any] | None = None) -> Any:
    """The method's options with ``given`` in place of its defaults.

    Raises InputError that names every option the method does not have, or the first value out of range.
    """
    known = [field.name for field in fields(method.options)]
    wrong = [unknown("option", name, known) for name in given or {} if name not in known]
    if wrong:
        raise InputError(problems(f"method {method.name!r}", wrong))
    return method.options(**(given or {}))
