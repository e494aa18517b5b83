"""One module of a model, replaced by its quantised version."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eckart.arch import get_module, set_module
from eckart.errors import InputError
from eckart.layers.build import tie_to, unsupported
from eckart.layers.linear import is_conv1d
from eckart.layers.quantised import PACKED_BITS, QuantisedEmbedding, QuantisedLinear
from eckart.linalg import round_groups


def quantise_layer(
    model: nn.Module,
    name: str,
    *,
    bits: int,
    group: int | None = None,
    second: Tensor | None = None,
    **rounding: Any,
) -> QuantisedLinear | QuantisedEmbedding:
    """Replace the module ``name`` of ``model`` by one with integer weights, and return that.

    The module is an nn.Linear, a Conv1D, a child ``a`` or ``b`` of a factored layer, or an nn.Embedding; heads and
    tables that share an embedding's weight are tied to the new one.

    Args:
        bits: 2, 4 or 8.
        group: columns (inputs) that share a scale, None for whole rows; for embeddings along the width.
        second: Σ = E[x xᵀ] of the module's inputs, for error feedback; for an embedding that of its head's inputs.
        rounding: further options of :func:`eckart.linalg.round_groups`.

    Raises InputError where there is no such module, where it cannot be quantised, and for options that cannot be;
    NotFiniteError for weights with NaN or Inf. The model is then unchanged. Cost: that of ``round_groups``.
    """
    layer = get_module(model, name)
    if bits not in PACKED_BITS:
        raise InputError(f"{name}: bits is 2, 4 or 8, which fill a byte; got {bits!r}.")
    if (reason := unsupported(layer)) is not None:
        raise InputError(f"{name} cannot be quantised: {reason}.")
    embedding = isinstance(layer, nn.Embedding)
    if not (embedding or isinstance(layer, nn.Linear) or is_conv1d(layer)):
        raise InputError(f"{name} cannot be quantised: it is a {type(layer).__name__}.")
    weight = layer.get_parameter("weight")
    if type(weight.data) is not Tensor:
        raise InputError(f"{name} cannot be quantised: its weight is a {type(weight.data).__name__} already.")
    shared = [
        other
        for other, module in model.named_modules()
        if module is not layer and module._parameters.get("weight") is weight
    ]
    if shared and not embedding:
        raise InputError(f"{name} shares its weight with {', '.join(shared)}. Quantise the embedding among them.")
    with torch.no_grad():
        rounded = round_groups(
            weight.T if is_conv1d(layer) else weight, bits=bits, group=group, second=second, **rounding
        )
    new: QuantisedLinear | QuantisedEmbedding
    if isinstance(layer, nn.Embedding):
        new = QuantisedEmbedding.from_embedding(layer, rounded)
    else:
        new = QuantisedLinear.from_linear(layer, rounded)
    heads = {other: tie_to(new, name, get_module(model, other)) for other in shared}
    for other, replacement in {name: new, **heads}.items():
        set_module(model, other, replacement)
    return new
