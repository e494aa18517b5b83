"""The decomposition of one site in a file, with its three error curves."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.apply import PreparedSite, prepare_site
from eckart.apply.prepare import site_moments
from eckart.arch import site_matrices
from eckart.checkpoint.weights import Mark, TensorWriter, read_tensors
from eckart.compression import CompressMethod, Prepared
from eckart.errors import InputError
from eckart.forms import Form
from eckart.moments import Moments, SiteMoments
from eckart.planning import Step
from eckart.records import Site

_SAME = 1e-5
"""How far left @ right may be from the weight on a random vector, relatively, to count as it."""


@dataclass(frozen=True)
class SiteCurves:
    """What is known of a site at rank 0 … full, each (full_rank + 1,) in float64."""

    errors: Tensor
    """The method's objective, in units of the loss where the method has them."""
    predicted: Tensor
    """Relative error on all of the calibration."""
    held_out: Tensor | None
    """The same for the decomposition of half A, on half B; None where that was not asked for or has no tokens."""


def decompose_to_file(
    path: Path,
    model: nn.Module,
    site: Site,
    moments: Moments | None,
    method: CompressMethod,
    options: Any,
    *,
    certify: bool,
) -> tuple[Mark, float]:
    """Decompose one site and write what every rank needs; returns the file's mark and the seconds of its CRC.

    Factors are stored in float32 (float64 for float64 weights), 1.5 to 4 times the bytes of the weight: each
    column is scaled so that both of its vectors have one norm, and rounding it once more to the weight's dtype
    when it is cut is below what that rounding changes anyway. Curves are float64.
    """
    part = prepare_site(model, site, moments, method, options)
    prepared = part.slices[0]
    whole = site_moments(moments, site, 0)
    tensors = {"errors": part.errors, "predicted": _predicted(prepared, whole, method)}
    if prepared.mean is not None:
        tensors["mean"] = prepared.mean
    store = torch.promote_types(prepared.weight.dtype, torch.float32)
    left, right = _one_norm(prepared.left, prepared.right)
    tensors |= {"left": left.to(store), "right": right.to(store)}
    del left, right, part, prepared, whole
    if certify and moments is not None:
        held_out = _held_out(model, site, moments, method, options)
        if held_out is not None:
            tensors = {"held_out": held_out, **tensors}
    layout = TensorWriter.ordered({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    with TensorWriter(path, layout) as writer:
        for name in layout:
            writer.write(name, tensors[name])
    return writer.mark, writer.seconds


def read_curves(path: Path) -> SiteCurves:
    """The curves of a site, without its factors."""
    tensors = read_tensors(path)
    held_out = tensors.get("held_out")
    return SiteCurves(
        tensors["errors"].clone(), tensors["predicted"].clone(), None if held_out is None else held_out.clone()
    )


def cut_from_file(path: Path, model: nn.Module, site: Site, step: Step, method: CompressMethod) -> Form:
    """The form that a plan's step gives the site."""
    if step.form not in ("lowrank", "pivoted"):
        raise InputError(f"{site.name}: nothing is cut for the form {step.form!r}.")
    tensors = read_tensors(path)
    (weights,) = site_matrices(model, site)
    rank = step.rank
    prepared = Prepared(
        weight=weights["weight"],
        bias=weights.get("bias"),
        left=tensors["left"][:, :rank].to(torch.float64),
        right=tensors["right"][:rank].to(torch.float64),
        errors=tensors["errors"][: rank + 1],
        mean=tensors.get("mean"),
    )
    return method.cut(prepared, rank, step.form)


def error_curve(left: Tensor, right: Tensor, moments: SiteMoments | None, *, centred: bool) -> Tensor:
    """tr(G Δ Σ Δᵀ) for Δ_k = left[:, k:] @ right[k:], for k = 0 … r at once: (r + 1,), float64.

    With P = leftᵀ G left and Q = right Σ rightᵀ it is Σ_{i,j≥k} P_ij Q_ij. Σ is the covariance where ``centred``,
    else E[x xᵀ]; G the gradient moment where there is one; the identity where there are no moments.
    Cost: m²r + n²r + (m + n) r² multiply-adds, what a single rank costs otherwise.
    """
    second = None if moments is None else moments.covariance if centred else moments.second
    gradient = None if moments is None else moments.gradient
    P = left.T @ (left if gradient is None else gradient @ left)
    Q = right @ (right.T if second is None else second @ right.T)
    M = P.mul_(Q)
    steps = M.diagonal() + 2 * M.triu(1).sum(1)
    curve = M.new_zeros(len(M) + 1)
    curve[:-1] = steps.flip(0).cumsum(0).flip(0)
    return curve.clamp_(min=0.0)


def _predicted(prepared: Prepared, moments: SiteMoments | None, method: CompressMethod) -> Tensor:
    """The relative error at every rank on the data that it was fitted to."""
    probe = torch.randn(prepared.right.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = prepared.weight.to(torch.float64) @ probe
    if not (prepared.left @ (prepared.right @ probe) - exact).norm() <= _SAME * exact.norm():
        raise InputError(f"method {method.name!r} does not give the weight back at full rank, so it cannot stream.")
    if moments is None:
        return _relative(prepared.errors)
    return _relative(error_curve(prepared.left, prepared.right, moments, centred=prepared.mean is not None))


def _held_out(model: nn.Module, site: Site, moments: Moments, method: CompressMethod, options: Any) -> Tensor | None:
    try:
        part: PreparedSite = prepare_site(model, site, moments, method, options, half="A")
        known = site_moments(moments, site, 0, "B")
    except InputError:
        return None
    prepared = part.slices[0]
    return _relative(error_curve(prepared.left, prepared.right, known, centred=prepared.mean is not None))


def _relative(curve: Tensor) -> Tensor:
    """Shares of the error at rank 0; zeros for a map that never spoke."""
    total = float(curve[0])
    return curve.to(torch.float64) / total if total > 0 else torch.zeros_like(curve, dtype=torch.float64)


def _one_norm(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ‖left[:, i]‖ = ‖right[i]‖, so that neither leaves the range of float32."""
    a, b = left.norm(dim=0), right.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
    return left * scale, right / scale[:, None]


@functools.cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def give_back_memory() -> None:
    """Hand freed memory back to the system, which glibc otherwise keeps in pieces that grow with every block."""
    trim = _trim()
    if trim is not None:
        trim(0)
