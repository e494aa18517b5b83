"""What a method asks of the moments and of its options, and the sentence for when it does not get it."""

from __future__ import annotations

from collections.abc import Mapping
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


def given(moments: SiteMoments | None, method: str) -> SiteMoments:
    """The moments, or InputError that says how to get them."""
    if moments is None:
        raise InputError(f"method {method!r} needs the moments of every map; got none; calibrate first.")
    return moments


def needed(
    moments: SiteMoments | None,
    what: Literal["second", "gradient", "fisher_rows", "fisher_columns"],
    method: str,
) -> Tensor:
    """The moment ``what``, or InputError that says how to get it."""
    value: Tensor | None = getattr(given(moments, method), what)
    if value is None:
        raise InputError(
            f"method {method!r} needs the moment {what!r} of every map; got moments without it; {_HOW[what]}."
        )
    return value


def input_metric(
    weights: Mapping[str, Tensor], moments: SiteMoments | None, correct_bias: bool, method: str
) -> tuple[Tensor, Tensor | None]:
    """Σ and the mean that the bias is to take up: the covariance and E[x] for maps with a bias.

    E[x xᵀ] and None for maps without one, for diagonals (embeddings), where the mean was not collected,
    and without ``correct_bias``.
    """
    second = needed(moments, "second", method)
    covariance = given(moments, method).covariance
    if covariance is None or not correct_bias or "bias" not in weights:
        return second, None
    return covariance, given(moments, method).mean


def option_share(method: str, name: str, value: object) -> None:
    """Raises InputError unless the option is a number in [0, 1]."""
    # NaN fails the comparison too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"method {method!r}: the option {name} is a number in [0, 1]; got {value!r}.")


def option_flag(method: str, name: str, value: object) -> None:
    """Raises InputError unless the option is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"method {method!r}: the option {name} is true or false; got {value!r}.")
