"""What a method asks of the moments and of its options, and the sentence for when it does not get it."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from eckart.errors import InputError
from eckart.moments import SiteMoments

_HOW = {
    "second": "calibrate with data",
    "gradient": "calibrate with gradients='full'",
    "fisher_rows": "calibrate with gradients='full' and fisher=True",
    "fisher_columns": "calibrate with gradients='full' and fisher=True",
}


def needed(
    moments: SiteMoments | None,
    what: Literal["second", "gradient", "fisher_rows", "fisher_columns"],
    method: str,
) -> Tensor:
    """The moment ``what``, or InputError that says how to get it."""
    value: Tensor | None = None if moments is None else getattr(moments, what)
    if value is None:
        found = "no moments at all" if moments is None else "moments without it"
        raise InputError(f"method {method!r} needs the moment {what!r} of every map; got {found}; {_HOW[what]}.")
    return value


def option_share(method: str, name: str, value: object) -> None:
    """Raises InputError unless the option is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
        raise InputError(f"method {method!r}: the option {name} is a number in [0, 1]; got {value!r}.")


def option_flag(method: str, name: str, value: object) -> None:
    """Raises InputError unless the option is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"method {method!r}: the option {name} is true or false; got {value!r}.")
