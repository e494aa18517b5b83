"""The part that all methods share: from two metrics to every rank at once, and from there to a form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from eckart.compression.method import Prepared
from eckart.errors import InputError, NotFiniteError
from eckart.forms import Form, LowRank, Pivoted
from eckart.linalg import pivot_rows, weighted_factors


def factorise(
    weights: Mapping[str, Tensor],
    *,
    second: Tensor | None = None,
    gradient: Tensor | None = None,
    mean: Tensor | None = None,
) -> Prepared:
    """Minimise tr(G ΔW Σ ΔWᵀ) for ``weights["weight"]`` W (out, in) at every rank up to min(out, in).

    ``second`` is Σ, (in, in) or its diagonal (in,); ``gradient`` is G, (out, out) or (out,); None stands for
    the identity. With ``mean`` μ (in,), the bias will take up ΔW μ when the matrix is cut; Σ should
    then be centred, and ``weights["bias"]`` (out,) must exist.

    Raises NotFiniteError for NaN or Inf in anything given, InputError for shapes that do not fit.
    Cost: see :func:`eckart.linalg.weighted_factors`.
    """
    weight, bias = weights["weight"], weights.get("bias")
    if mean is not None and bias is None:
        raise InputError("factorise: got a mean input, but the map has no bias to take it up; leave it out.")
    given = {"weight": weight, "bias": bias, "E[x]": mean, "metric of x": second, "metric of g": gradient}
    for what, tensor in given.items():
        if tensor is not None and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise NotFiniteError(
                f"{what} holds {bad} NaN or Inf among its {tensor.numel()} entries; it must be finite. "
                "Check the checkpoint, or calibrate in float32."
            )
    factors = weighted_factors(weight, second, gradient)
    return Prepared(
        weight=weight,
        bias=bias,
        left=factors.left,
        right=factors.right,
        errors=factors.errors,
        mean=None if mean is None else mean.to("cpu", torch.float64),
    )


def cut(prepared: Prepared, rank: int, form: Literal["lowrank", "pivoted"]) -> Form:
    """Ŵ at ``rank`` in the dtype and on the device of the weight; a rank above min(out, in) becomes that.

    ``lowrank`` factors are balanced: column i of b and row i of a have the same norm, so that neither
    leaves the range of float16 nor wastes its precision. ``pivoted`` keeps ``rank`` rows of Ŵ itself.
    All is computed in float64 and rounded once; where the method corrects the bias, the correction is
    (W − Ŵ) μ for Ŵ as rounded, so that it takes up the mean of the rounding error too.

    Raises InputError for a rank below 1 or an unknown form, NotFiniteError where rounding overflows.
    Cost: O(rank · (out + in)), for ``pivoted`` one QR of (out, rank) and the product of the kept rows.
    """
    if rank < 1:
        raise InputError(f"cut: expected a rank of at least 1; got {rank}. To drop a map, prune it.")
    rank = min(rank, prepared.errors.numel() - 1)
    left, right = prepared.left[:, :rank], prepared.right[:rank]
    if form == "lowrank":
        b, a = (_rounded(factor, prepared.weight) for factor in _balanced(left, right))
        stored = LowRank(a=_exact(a), b=_exact(b))
        return LowRank(a=a, b=b, bias=_corrected_bias(prepared, stored))
    if form == "pivoted":
        kept, rest, T = pivot_rows(left)
        index = torch.cat([kept, rest]).argsort()
        a, b = _rounded(left[kept] @ right, prepared.weight), _rounded(T, prepared.weight)
        bias = _corrected_bias(prepared, Pivoted(a=_exact(a), b=_exact(b), index=index))
        return Pivoted(a=a, b=b, index=index.to(a.device), bias=bias)
    raise InputError(f"cut: expected the form 'lowrank' or 'pivoted'; got {form!r}.")


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ‖left[:, i]‖ = ‖right[i]‖ for every i; a direction that is zero stays zero."""
    left_norms, right_norms = left.norm(dim=0), right.norm(dim=1)
    alive = (left_norms > 0) & (right_norms > 0)
    scale = torch.where(alive, (right_norms / left_norms).sqrt(), 1.0)
    return left * scale, right / scale[:, None]


def _rounded(factor: Tensor, weight: Tensor) -> Tensor:
    """``factor`` in the dtype and on the device of the weight that it stands for."""
    rounded = factor.to(weight.device, weight.dtype).contiguous()
    if not rounded.isfinite().all():
        raise NotFiniteError(
            f"a factor of this matrix leaves the range of {weight.dtype} (largest entry "
            f"{float(factor.abs().max()):.3g}); keep the layer dense or compress it in bfloat16 or float32."
        )
    return rounded


def _exact(factor: Tensor) -> Tensor:
    """The stored numbers, without further rounding."""
    return factor.to("cpu", torch.float64)


def _corrected_bias(prepared: Prepared, stored: Form) -> Tensor | None:
    """b + (W − Ŵ) μ for the Ŵ that ``stored`` holds in float64, or b where the method leaves it alone."""
    if prepared.mean is None or prepared.bias is None:
        return prepared.bias
    lost = _exact(prepared.weight) @ prepared.mean - stored.apply(prepared.mean)
    return _rounded(_exact(prepared.bias) + lost, prepared.bias)
