"""The inputs and outputs of a module as rows: y = W x holds row by row with the site's matrices W."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from eckart.errors import InputError
from eckart.records import Site

CHUNK_NUMBERS = 1 << 24
"""Unfolded inputs are k² times larger than the image; they are made for that many numbers at a time (128 MB)."""


def leading_shape(site: Site, x: Tensor) -> tuple[int, ...]:
    """The dimensions of the input ``x`` that count tokens, before its rows are made."""
    if site.kind == "embedding":
        return tuple(x.shape)
    if site.kind == "conv":
        return (x.shape[0],)
    return tuple(x.shape[:-1])


def batched(site: Site, module: nn.Module, x: Tensor) -> Tensor:
    """An image without its batch dimension gets one."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and x.ndim == len(module.kernel_size) + 1:
        return x.unsqueeze(0)
    return x


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Paddings for ``functional.pad``, last dimension first; ``same`` puts the odd one at the end."""
    amounts: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "valid":
            amounts += [0, 0]
        elif module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [int(module.padding[axis])] * 2
    return amounts


def unfold(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """x (batch, channels, *space) → (groups, batch · positions, channels/groups · kernel), channels first.

    With ``weight.reshape(groups, out/groups, -1)`` as matrices W, output position by position, y = W x + b.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, _padding(module), mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    batch, width, positions = columns.shape
    per_group = columns.view(batch, module.groups, width // module.groups, positions)
    return per_group.permute(1, 0, 3, 2).reshape(module.groups, batch * positions, width // module.groups)


def input_rows(site: Site, module: nn.Module, x: Tensor) -> Tensor:
    """(slices, N, in_features); (1, N) ids for an embedding."""
    if site.kind == "embedding":
        return x.reshape(1, -1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return unfold(module, x)
    return x.reshape(1, -1, site.in_features)


def output_rows(site: Site, module: nn.Module, y: Tensor) -> Tensor:
    """(slices, N, out_features), N as in ``input_rows``."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        batch, positions = y.shape[0], math.prod(y.shape[2:])
        split = y.reshape(batch, site.slices, site.out_features, positions)
        return split.permute(1, 0, 3, 2).reshape(site.slices, batch * positions, site.out_features)
    return y.reshape(1, -1, site.out_features)


def pieces(
    site: Site, module: nn.Module, x: Tensor, picks: tuple[Tensor, Tensor]
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Parts of a batch that are worked through one after the other, and the rows of each half in them.

    ``picks`` are rows of ``leading_shape``. A convolution has a row per position of every picked image.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        yield slice(None), picks
        return
    positions = math.prod(_output_space(module, x))
    step = max(1, CHUNK_NUMBERS // max(1, positions * site.slices * site.in_features))
    for start in range(0, x.shape[0], step):
        size = min(step, x.shape[0] - start)
        inside = [pick[(pick >= start) & (pick < start + size)] - start for pick in picks]
        offsets = torch.arange(positions, device=x.device)
        a, b = ((pick[:, None] * positions + offsets).reshape(-1) for pick in inside)
        yield slice(start, start + size), (a, b)


def _output_space(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> list[int]:
    pads = _padding(module)
    space = []
    for axis, size in enumerate(x.shape[2:]):
        before, after = pads[2 * (len(module.kernel_size) - 1 - axis) :][:2]
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        space.append((size + before + after - reach) // module.stride[axis] + 1)
    return space


def check_shapes(site: Site, module: nn.Module, x: Tensor, y: Tensor) -> None:
    """InputError where the module does not take and give what its site says."""
    if site.kind == "conv":
        if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
            raise InputError(f"site {site.name!r} is a conv; got a {type(module).__name__}.")
        kernel = math.prod(module.kernel_size)
        found = (module.groups, module.out_channels // module.groups, module.in_channels // module.groups * kernel)
        if found != (site.slices, site.out_features, site.in_features):
            raise InputError(
                f"site {site.name!r} says {(site.slices, site.out_features, site.in_features)} as (groups, out, in); "
                f"its module has {found}."
            )
        return
    width = site.in_features if site.kind == "embedding" else x.shape[-1]
    if width != site.in_features or y.shape[-1] != site.out_features:
        raise InputError(
            f"site {site.name!r} maps {site.in_features} to {site.out_features} features; "
            f"its module got {tuple(x.shape)} and returned {tuple(y.shape)}."
        )
