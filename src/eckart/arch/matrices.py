"""The matrices of a site, out of the module that stores them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from eckart.arch.modules import site_module
from eckart.errors import InputError, NotFiniteError, problems
from eckart.linalg import matricize
from eckart.records import Site


def stored_weight(model: nn.Module, site: Site) -> Tensor:
    """The weight of a site as its module stores it, detached: a view of the parameter, not a copy.

    Raises InputError where the module is gone, or its weight has another number of entries than the site.
    """
    name = site.name.rpartition(".")[2] if site.kind == "experts" else "weight"
    weight = getattr(site_module(model, site), name, None)
    if not isinstance(weight, Tensor) or weight.numel() != site.weight_parameters:
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        raise InputError(
            f"{site.name}: expected {site.slices} × ({site.out_features} × {site.in_features}) numbers, "
            f"got {got}. The site belongs to another model."
        )
    return weight.detach()


def site_matrices(model: nn.Module, site: Site) -> list[dict[str, Tensor]]:
    """One ``{"weight": (out, in), "bias": (out,)}`` per slice, without ``"bias"`` where there is none.

    Views of the parameters wherever torch can give one, in their dtype and on their device.
    :func:`eckart.linalg.fold` is the way back to the stored layout.
    """
    stack = matricize(stored_weight(model, site), site.kind, site.slices if site.kind == "conv" else 1)
    matrices = [{"weight": weight} for weight in stack]
    if site.bias:
        rows = _stored_bias(model, site).reshape(site.slices, site.out_features)
        for matrix, row in zip(matrices, rows, strict=True):
            matrix["bias"] = row
    return matrices


def check_finite(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raises NotFiniteError that names every site with NaN or Inf in its weight or bias."""
    faults = []
    for site in sites:
        tensors = [("weight", stored_weight(model, site))]
        if site.bias:
            tensors.append(("bias", _stored_bias(model, site)))
        for what, tensor in tensors:
            bad = int(tensor.numel() - torch.isfinite(tensor).sum())
            if bad:
                faults.append(f"{site.name}: {bad} of {tensor.numel()} numbers of the {what} are NaN or Inf")
    if faults:
        raise NotFiniteError(problems("weights", faults))


def _stored_bias(model: nn.Module, site: Site) -> Tensor:
    bias = getattr(site_module(model, site), "bias", None)
    if not isinstance(bias, Tensor) or bias.numel() != site.slices * site.out_features:
        raise InputError(f"{site.name}: expected a bias of {site.slices * site.out_features} numbers.")
    return bias.detach()
