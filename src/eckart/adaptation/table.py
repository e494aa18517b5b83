"""Every adaptation method by name. A new method is one file and one line here."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from eckart.adaptation import eva, fedsvd, flora, lora, osf, pissa, said, salt, sara, snnk, soka, sorsa, svfit
from eckart.adaptation.method import AdaptMethod
from eckart.compression import options_for
from eckart.errors import InputError, unknown

ADAPTATIONS: dict[str, AdaptMethod] = {
    method.name: method
    for method in (
        lora.METHOD,
        pissa.METHOD,
        svfit.METHOD,
        sorsa.METHOD,
        salt.METHOD,
        soka.METHOD,
        eva.METHOD,
        flora.METHOD,
        osf.METHOD,
        sara.METHOD,
        said.METHOD,
        fedsvd.METHOD,
        snnk.METHOD,
    )
}
"""In the order in which they are shown."""


def get_adaptation(name: str) -> AdaptMethod:
    """The method of that name. Raises InputError with the nearest names."""
    if name not in ADAPTATIONS:
        raise InputError(unknown("adaptation method", str(name), ADAPTATIONS))
    return ADAPTATIONS[name]


def adapt_options(method: AdaptMethod, given: Any) -> Any:
    """The method's options from None, a mapping of some of them, or the options themselves.

    Raises InputError for unknown ones, all at once, and for the options of another method.
    """
    if is_dataclass(given) and not isinstance(given, type):
        if type(given) is not method.options:
            raise InputError(f"the options belong to {type(given).__module__}, not to the method {method.name!r}.")
        given = asdict(given)
    return options_for(method, given)
