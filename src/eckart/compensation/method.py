"""The record of a compensation method, and the part that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.compression import Need, Prepared, cut, factorise
from eckart.errors import InputError
from eckart.forms import LowRank
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper


@dataclass(frozen=True)
class Repair:
    """What is added to Ŵ (out × in): two factors, best first."""

    form: LowRank
    """b a of rank r, without a bias, in the dtype and on the device of W. Its first k columns of b and rows of a
    are the repair of rank k."""
    errors: Tensor
    """(min(out, in) + 1,): the method's objective of W − Ŵ − b a at rank 0, 1, …, never rising."""

    def cut(self, rank: int) -> LowRank:
        """The repair of a lower rank, 0 for none."""
        return LowRank(a=self.form.a[:rank], b=self.form.b[:, :rank])


@dataclass(frozen=True, kw_only=True)
class CompensateMethod:
    """A way of choosing a low-rank repair, as a value."""

    name: str
    summary: str
    paper: Paper
    needs: frozenset[Need]
    """Moments that it uses; the calibration collects what the chosen method needs."""
    options: type[Any]
    """Frozen keyword-only dataclass; the only place of the method's defaults."""
    repair: Callable[[Tensor, Tensor, SiteMoments | None, Any, int], Repair]
    """``repair(W, Ŵ, moments, options, rank)`` for one matrix; a rank above min(out, in) becomes that."""
    loss_units: bool
    """Whether errors × ``SiteMoments.loss_scale`` estimates a rise of the loss, which one budget for all needs."""
    claim: Claim


def residual(weight: Tensor, approximation: Tensor) -> Tensor:
    """E = W − Ŵ (out, in) in float64 on the CPU. Raises InputError where the two differ in shape."""
    if weight.shape != approximation.shape or weight.ndim != 2:
        raise InputError(
            f"a repair needs a matrix and its approximation in one shape; got {tuple(weight.shape)} and "
            f"{tuple(approximation.shape)}."
        )
    return weight.to("cpu", torch.float64) - approximation.to("cpu", torch.float64)


def repair_of(prepared: Prepared, weight: Tensor, rank: int) -> Repair:
    """The first ``rank`` directions of a decomposed residual, rounded once to the dtype of ``weight``.

    Raises InputError for a rank below 1, NotFiniteError where a factor leaves the range of the dtype.
    """
    form = cut(dataclasses.replace(prepared, weight=weight), rank, "lowrank")
    if not isinstance(form, LowRank):
        raise InputError(f"a repair is a product of two factors; got a form of kind {form.kind!r}.")
    return Repair(form, prepared.errors)


def weighted_repair(
    weight: Tensor, approximation: Tensor, rank: int, *, second: Tensor | None = None, gradient: Tensor | None = None
) -> Repair:
    """Minimise tr(G (E − b a) Σ (E − b a)ᵀ) for E = W − Ŵ at rank ``rank``; None stands for the identity.

    ``second`` is Σ, (in, in) or its diagonal (in,); ``gradient`` is G, (out, out) or (out,). No inverse of either.
    Cost: see :func:`eckart.linalg.weighted_factors`.
    """
    prepared = factorise({"weight": residual(weight, approximation)}, second=second, gradient=gradient)
    return repair_of(prepared, weight, rank)
