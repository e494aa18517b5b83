"""Adapters whose numbers FSDP spreads over processes: whole for as long as something is computed from them.

Within a forward pass FSDP gathers them itself. Penalties, what follows a step, and files need them at other times.
FSDP divides a parameter along its first dimension unless told otherwise, and for adapters that is the slices, mostly
one: so each layer's numbers lie whole on the first process, which costs nothing that matters at their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from eckart.adaptation import Delta


def is_spread(tensor: Tensor) -> bool:
    """Whether each process holds a part of it."""
    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor; for one that is spread every process of its mesh has to ask. Differentiable."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(delta: Delta) -> bool:
    """Whether numbers of this adapter are spread over processes."""
    return any(is_spread(p) for p in delta.parameters())


@contextmanager
def standing_in(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other tensors in place of some of its parameters and buffers, by name."""
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    for name, value in values.items():
        (module._parameters if name in parameters else module._buffers)[name] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)


@contextmanager
def whole(delta: Delta) -> Iterator[None]:
    """The adapter with all of its parameters here. Gradients reach the parts; what is written to them does too.

    Where the parameters are spread, every process has to enter.
    """
    parts: dict[str, Any] = {name: p for name, p in delta._parameters.items() if isinstance(p, DTensor)}
    if not parts:
        yield
        return
    full = {name: part.full_tensor() for name, part in parts.items()}
    versions = {name: value._version for name, value in full.items()}
    with standing_in(delta, full):
        yield
    with torch.no_grad():
        for name, part in parts.items():
            if full[name]._version != versions[name]:
                same = DTensor.from_local(
                    full[name].detach(), part.device_mesh, [Replicate()] * part.device_mesh.ndim, run_check=False
                )
                part.to_local().copy_(same.redistribute(placements=part.placements).to_local())
