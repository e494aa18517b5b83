"""The decomposition of one matrix in a file, with its error curves, and the layers that come out of such files."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.apply import PreparedSite
from eckart.apply.bits import metric_of, quantisable, quantise_site, site_bits
from eckart.apply.prepare import prepare_slice, site_moments
from eckart.arch import site_matrices
from eckart.checkpoint.weights import Mark, TensorWriter, read_tensors
from eckart.compression import CompressMethod, Prepared, get_method, kfac
from eckart.errors import InputError
from eckart.forms import Form
from eckart.layers import QuantisedLinear, layer_from_forms
from eckart.linalg import round_groups, weighted_factors
from eckart.moments import Moments, SiteMoments
from eckart.moments.packed import packed, unpack_into
from eckart.planning import Choices, Step
from eckart.records import Site
from eckart.streaming.plan import Wanted, number_bytes, site_choices

_SAME = 1e-5
"""How far left @ right may be from the weight on a random vector, relatively, to count as it."""
_COLUMNS = ("form", "rank", "parameters", "bytes", "macs", "loss", "bits", "repair")
"""Of :class:`eckart.planning.Choices`."""
_READS = "reads"
"""Position of the file with the moment of what a site reads."""


@dataclass(frozen=True)
class SiteCurves:
    """What is known of a site at rank 0 … full, each (full_rank + 1,) in float64."""

    errors: Tensor
    """The method's objective, in units of the loss where the method has them, added up over the slices."""
    predicted: Tensor
    """Relative error on all of the calibration, averaged over the slices."""
    held_out: Tensor | None
    """The same for the decomposition of half A, on half B, over the slices that have tokens there; None where that was
    not asked for or has no tokens."""
    choices: Choices | None = None
    """What the site may become, where numbers may be stored in few bits."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One slice of a site, and where its moments are."""

    site: Site
    slice: int
    slot: int
    """Slice of the collected moments that are its own."""
    reads: int
    """Position of the file with E[x xᵀ], which rounding to few bits needs."""


def decompose_to_file(
    path: Path,
    model: nn.Module,
    matrix: Matrix,
    moments: Moments | None,
    method: CompressMethod,
    options: Any,
    wanted: Wanted,
    *,
    certify: bool,
) -> tuple[Mark, float]:
    """Decompose one matrix and write what every rank needs; returns the file's mark and the seconds of its CRC.

    Factors are stored in float32 (float64 for float64 weights), 1.5 to 4 times the bytes of the weight: each
    column is scaled so that both of its vectors have one norm, and rounding it once more to the weight's dtype
    when it is cut is below what that rounding changes anyway. Curves are float64. Where numbers may be stored in few
    bits, the choices of the site and the factors of its repairs lie beside.
    """
    site, slot = matrix.site, matrix.slot
    weights = site_matrices(model, site)[matrix.slice]
    prepared, errors = prepare_slice(site, weights, slot, moments, method, options)
    whole = site_moments(moments, site, slot)
    tensors = {"errors": errors, "predicted": _predicted(prepared, whole, method)}
    if prepared.mean is not None:
        tensors["mean"] = prepared.mean
    if wanted.bits and whole is not None and quantisable(site):
        part = PreparedSite(site=site, slices=(prepared,), errors=errors)
        tensors |= _in_few_bits(model, part, weights, whole, wanted) | {_READS: torch.tensor([matrix.reads])}
        del part
    store = torch.promote_types(prepared.weight.dtype, torch.float32)
    left, right = _one_norm(prepared.left, prepared.right)
    tensors |= {"left": left.to(store), "right": right.to(store)}
    del left, right, prepared, whole
    if certify and moments is not None:
        held_out = _held_out(site, weights, slot, moments, method, options)
        if held_out is not None:
            tensors = {"held_out": held_out, **tensors}
    return write_tensors(path, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Mark, float]:
    """One file; returns its mark and the seconds of its CRC."""
    layout = TensorWriter.ordered({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
    with TensorWriter(path, layout) as writer:
        for name in layout:
            writer.write(name, tensors[name])
    return writer.mark, writer.seconds


def write_second(path: Path, second: Tensor) -> tuple[Mark, float]:
    """E[x xᵀ], one triangle of it."""
    return write_tensors(path, {"second": packed(second)})


def read_second(path: Path, width: int) -> Tensor:
    """The way back: (width, width), float64."""
    second = torch.empty(width, width, dtype=torch.float64)
    unpack_into(second, read_tensors(path)["second"])
    return second


def read_curves(paths: Sequence[Path]) -> SiteCurves:
    """The curves of a site out of the files of its slices, without its factors."""
    errors, predicted, held_out = [], [], []
    choices = None
    for path in paths:
        tensors = read_tensors(path)
        errors.append(tensors["errors"].clone())
        predicted.append(tensors["predicted"].clone())
        if "held_out" in tensors:
            held_out.append(tensors["held_out"].clone())
        if "choices/rank" in tensors:
            columns = [tensors[f"choices/{name}"].clone().numpy() for name in _COLUMNS]
            size = [int(value) for value in tensors["choices/whole"]]
            choices = Choices.stored(columns, size)
    return SiteCurves(
        torch.stack(errors).sum(0),
        torch.stack(predicted).mean(0),
        torch.stack(held_out).mean(0) if held_out else None,
        choices,
    )


def cut_from_file(path: Path, weights: Mapping[str, Tensor], site: Site, step: Step, method: CompressMethod) -> Form:
    """The form that a plan's step gives one matrix of a site."""
    if step.form not in ("lowrank", "pivoted"):
        raise InputError(f"{site.name}: nothing is cut for the form {step.form!r}.")
    tensors = read_tensors(path)
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


def layer_from_files(
    paths: Sequence[Path], seconds: Mapping[int, Path], model: nn.Module, site: Site, step: Step, original: nn.Module
) -> nn.Module:
    """The layer that a step puts in the place of ``original``, out of the files of the slices.

    ``seconds`` are the files of the moments that rounding to few bits needs, by position.
    """
    layer = original
    if step.form != "dense":
        weights = site_matrices(model, site)
        method = get_method(step.method)
        forms = [cut_from_file(path, each, site, step, method) for path, each in zip(paths, weights, strict=True)]
        layer = layer_from_forms(site, original, forms)
    if not step.bits:
        return layer
    tensors = read_tensors(paths[0])
    second = read_second(seconds[int(tensors[_READS])], site.in_features)
    if step.form == "dense" and step.repair:
        (weight,) = site_matrices(model, site)
        rounded = round_groups(weight["weight"], bits=step.bits, group=step.group, second=second)
        left, right = (tensors[f"repair{step.bits}/{side}"] for side in ("left", "right"))
        dtype = weight["weight"].dtype
        pair = (right[: step.repair].to(dtype), left[:, : step.repair].to(dtype))
        return QuantisedLinear.from_linear(original, rounded, repair=pair)
    holder = nn.Module()
    holder.add_module("site", layer)
    with torch.no_grad():
        quantise_site(holder, "site", step, second)
    return holder.get_submodule("site")


def _in_few_bits(
    model: nn.Module, part: PreparedSite, weights: Mapping[str, Tensor], moments: SiteMoments, wanted: Wanted
) -> dict[str, Tensor]:
    """The choices of a site with their bits, and the factors of the largest repair at each width."""
    site = part.site
    metric = metric_of(dict(weights), moments, kfac.Options())
    choices = site_choices(model, site, part.errors.numpy(), wanted)
    choices = site_bits(part, choices, metric, wanted.bits, number_bytes(model, site))
    tensors = {f"choices/{name}": torch.from_numpy(c) for name, c in zip(_COLUMNS, choices.columns(), strict=True)}
    tensors["choices/whole"] = torch.tensor([choices.whole.parameters, choices.whole.bytes, choices.whole.macs])
    weight = weights["weight"]
    for bits in wanted.bits:
        rank = int(choices.repair[choices.bits == bits].max(initial=0))
        if rank:
            rounded = round_groups(weight, bits=bits, group=wanted.group, second=metric.raw)
            residual = weight.to("cpu", torch.float64) - rounded.dense().to("cpu", torch.float64)
            factors = weighted_factors(residual, metric.second, metric.gradient)
            left, right = _one_norm(factors.left[:, :rank], factors.right[:rank])
            store = torch.promote_types(weight.dtype, torch.float32)
            tensors |= {f"repair{bits}/left": left.to(store), f"repair{bits}/right": right.to(store)}
    return tensors


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


def _held_out(
    site: Site, weights: Mapping[str, Tensor], slot: int, moments: Moments, method: CompressMethod, options: Any
) -> Tensor | None:
    try:
        prepared, _ = prepare_slice(site, weights, slot, moments, method, options, half="A")
        known = site_moments(moments, site, slot, "B")
    except InputError:
        return None
    if known is None or known.count == 0:
        return None
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
