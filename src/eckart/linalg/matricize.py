"""Weights of every kind as stacks of matrices (slices, out, in), and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eckart.errors import InputError
from eckart.records import SiteKind

_DIMS: dict[SiteKind, str] = {
    "linear": "(out, in)",
    "conv1d": "(in, out)",
    "conv": "(out, in/groups, kernel …)",
    "embedding": "(entries, width)",
    "experts": "(experts, out, in)",
}


def matricize(weight: Tensor, kind: SiteKind, groups: int = 1) -> Tensor:
    """The weight as (slices, out, in), a view wherever torch can give one.

    ========= ============================== ==========================================
    kind      weight                         result
    ========= ============================== ==========================================
    linear    (out, in)                      (1, out, in)
    conv1d    (in, out), transformers' Conv1D (1, out, in)
    conv      (out, in/groups, kernel …)     (groups, out/groups, in/groups · Π kernel)
    embedding (entries, width)               (1, width, entries)
    experts   (experts, out, in)             (experts, out, in)
    ========= ============================== ==========================================

    The columns of a convolution are ordered as ``torch.nn.functional.unfold`` orders its rows.
    Raises InputError where the shape does not fit the kind or ``groups`` does not divide out.
    """
    _check(tuple(weight.shape), kind, groups)
    if kind == "conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    if kind == "experts":
        return weight
    matrix = weight.T if kind in ("conv1d", "embedding") else weight
    return matrix.unsqueeze(0)


def fold(matrices: Tensor, kind: SiteKind, shape: Sequence[int]) -> Tensor:
    """The weight of ``shape`` whose :func:`matricize` is ``matrices`` (slices, out, in)."""
    _check(tuple(shape), kind, matrices.shape[0] if kind == "conv" else 1)
    if kind == "conv":
        return matrices.reshape(tuple(shape))
    weight = matrices if kind == "experts" else matrices[0]
    if kind in ("conv1d", "embedding"):
        weight = weight.T
    if weight.shape != tuple(shape):
        raise InputError(f"fold: {tuple(matrices.shape)} is not a {kind} weight of shape {tuple(shape)}.")
    return weight


def _check(shape: tuple[int, ...], kind: SiteKind, groups: int) -> None:
    fits = {"conv": len(shape) >= 3, "experts": len(shape) == 3}.get(kind, len(shape) == 2)
    if not fits:
        raise InputError(f"a {kind} weight has shape {_DIMS[kind]}; got {shape}.")
    if groups != 1 and kind != "conv":
        raise InputError(f"only convolutions have groups; got groups={groups} for a {kind} weight.")
    if groups < 1 or shape[0] % groups:
        raise InputError(f"groups divides the {shape[0]} output channels; got {groups}.")
