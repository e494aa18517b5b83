"""The record of a compression method, and the part that all SVD-type methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from eckart.forms import Form
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Site

Need = Literal["mean", "second", "diagonal", "gradient", "gradient_scale", "fisher"]


@dataclass(frozen=True)
class Prepared:
    """The decomposition of one matrix, paid for once: Ŵ at rank k is ``left[:, :k] @ right[:k]``."""

    weight: Tensor
    """(out × in), as given."""
    bias: Tensor | None
    left: Tensor
    """(out × r), in the dtype of the decomposition."""
    right: Tensor
    """(r × in)."""
    errors: Tensor
    """(r + 1,): the method's objective at rank 0 … r, exact, never rising; errors[0] is that of Ŵ = 0."""
    mean: Tensor | None = None
    """(in,): the mean input, where the bias takes up (W − Ŵ)·mean."""


@dataclass(frozen=True, kw_only=True)
class CompressMethod:
    """A way of choosing Ŵ, as a value."""

    name: str
    summary: str
    paper: Paper
    needs: frozenset[Need]
    """Moments that it uses; the calibration collects what the chosen method needs."""
    options: type[Any]
    """Frozen keyword-only dataclass; the only place of the method's defaults."""
    fits: Callable[[Site], str | None]
    """None, or the reason why the method cannot take this site."""
    prepare: Callable[[Mapping[str, Tensor], SiteMoments | None, Any], Prepared]
    """``prepare({"weight": W, "bias": b}, moments, options)`` for one matrix."""
    cut: Callable[[Prepared, int, Literal["lowrank", "pivoted"]], Form]
    loss_units: bool
    """Whether errors × ``SiteMoments.loss_scale`` estimates a rise of the loss, which global budgets need."""
    claim: Claim
