"""What a model lost against the one that it was made from: found map by map, whatever stores the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.arch import find_sites, get_module, site_matrices, skipped_sites
from eckart.errors import InputError, MismatchError, problems
from eckart.layers import NarrowColumns, NarrowRows
from eckart.records import Site

_COARSENESS = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_SHOWN = 8
_NOTED = 3
"""Remarks in an error."""
_ROOM = 1.01
"""Rounding and pruning leave every map nearer to its original than a map of zeros, at distance 1, would be; the maps
of two different models are about √2 apart."""


@dataclass(frozen=True)
class Damage:
    """The difference between a model and its base."""

    sites: tuple[Site, ...]
    """Linear maps whose weights differ: what a repair can be put beside."""
    notes: tuple[str, ...]
    """What differs too and stays as it is."""


def dense_map(module: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """W (out, in) and the bias (out,) of a linear map, however the module stores them.

    Reads ``.dense()`` of Eckart's layers, ``weight.dequantize()`` of quantised tensors (torchao), and plain
    weights, which ``Conv1D`` of transformers keeps (in, out). Raises InputError for anything else.
    """
    dense = getattr(module, "dense", None)
    weight = dense() if callable(dense) else getattr(module, "weight", None)
    if not callable(dense) and isinstance(weight, Tensor):
        if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"):
            weight = weight.dequantize()
        if site.kind == "conv1d":
            weight = weight.T
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise InputError(
            f"{site.name}: a {type(module).__name__} does not say what its weight is; expected a plain weight, a "
            "torchao tensor, or a layer with dense()."
        )
    bias = getattr(module, "bias", None)
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def find_damage(base: nn.Module, damaged: nn.Module) -> Damage:
    """The linear maps of ``damaged`` that differ from those of ``base``, and whether the two belong together.

    Numbers are compared in the coarser of their two dtypes, so that a model in bfloat16 is the same as in float32.
    Raises MismatchError, with what differs, where ``damaged`` cannot have been made from ``base`` by rounding,
    pruning or factorising linear maps: another class, other shapes, other norms, or weights
    that are further from the base's than zeros would be. Raises InputError for layers that cannot be read, and
    where no map differs.
    """
    if type(base).__name__ != type(damaged).__name__:
        raise MismatchError(f"a {type(damaged).__name__} cannot come from a {type(base).__name__}. Give its original.")
    everything = find_sites(base, embeddings=True, head=True)
    linear = [site for site in everything if site.kind in ("linear", "conv1d")]
    faults: list[str] = []
    unread: list[str] = []
    notes: list[str] = []
    differing: list[Site] = []
    for site in linear:
        if isinstance(get_module(damaged, site.name), (NarrowRows, NarrowColumns)):
            # Values and queries may have another basis: such a map is comparable only with the others of its attention.
            notes.append(f"{site.name} is narrower together with others, and stays as it is")
            continue
        try:
            weight, bias = dense_map(get_module(damaged, site.name), site)
        except InputError as error:
            unread.append(str(error))
            continue
        original, shape = site_matrices(base, site)[0], (site.out_features, site.in_features)
        if weight.shape != shape:
            narrowed = all(ours <= theirs for ours, theirs in zip(weight.shape, shape, strict=True))
            text = f"{site.name} is {tuple(weight.shape)} here and {shape} in the base"
            (notes if narrowed else faults).append(f"{text}: narrowed, and stays as it is" if narrowed else text)
        elif _agree(original["weight"], weight):
            if site.bias and (bias is None or not _agree(original["bias"], bias)):
                notes.append(f"{site.name} differs in its bias alone and stays as it is")
        elif (distance := _distance(original["weight"], weight)) > _ROOM:
            faults.append(f"{site.name} is further from the base's ({distance:.2f}) than zeros would be (1)")
        elif site.tied:
            notes.append(f"{site.name} shares its weight with {', '.join(site.tied)} and stays as it is")
        else:
            differing.append(site)
    repairable = {name for site in linear for name in (site.name, *site.tied)}
    others = {name for site in everything for name in (site.name, *site.tied)} - repairable
    others |= {name for name, _ in skipped_sites(base)}
    for fault, text in _others(base, damaged, repairable, others):
        (faults if fault else notes).append(text)
    if faults:
        shown = faults[:_SHOWN] + ([f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])
        raise MismatchError(problems("this is not the model that the damaged one was made from", shown))
    if unread:
        raise InputError(problems("layers that cannot be repaired", unread[:_SHOWN]))
    if not differing:
        raise InputError(
            "no linear map differs from the base's, so there is nothing to repair."
            + "".join(f" {note}." for note in notes[:_NOTED])
            + (f" And {len(notes) - _NOTED} more." if len(notes) > _NOTED else "")
        )
    return Damage(tuple(differing), tuple(notes))


def _others(base: nn.Module, damaged: nn.Module, linear: set[str], maps: set[str]) -> Iterator[tuple[bool, str]]:
    """(fault, sentence) for every difference outside of the linear maps; other ``maps`` may be damaged too."""
    there = dict(damaged.named_parameters(remove_duplicate=False))
    for name, parameter in base.named_parameters(remove_duplicate=False):
        module, other = name.rpartition(".")[0], there.get(name)
        if module in linear:
            continue
        map_ = module in maps or name in maps
        if other is None or other.shape != parameter.shape or not other.is_floating_point():
            yield not map_, f"{name} is stored in another way" if map_ else f"{name} is not there in this shape"
        elif not _agree(parameter, other):
            near = map_ and _distance(parameter, other) <= _ROOM
            yield not near, f"{name} differs" + (" and stays as it is" if near else "")


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    coarse = max((a.dtype, b.dtype), key=lambda dtype: _COARSENESS.get(dtype, 4))
    return torch.equal(a.detach().cpu().to(coarse), b.detach().cpu().to(coarse))


def _distance(original: Tensor, other: Tensor) -> float:
    """‖W − Ŵ‖ / ‖W‖."""
    W = original.detach().to("cpu", torch.float64)
    norm = float(W.norm())
    return float((W - other.detach().to("cpu", torch.float64)).norm()) / norm if norm else float("inf")
