"""What parameters remember between steps, as tensors of a few dtypes, for several parameters at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eckart.linalg import pack, unpack
from eckart.optim.feedback import Stored
from eckart.optim.layout import WHOLE, Layout, local

BLOCK = 256
"""Neighbours along the last dimension that share a scale in int8."""


class Memory:
    """Entries of the states of equal pieces, stacked along the first dimension.

    ``states`` are (state of the parameter, suffix of the piece). With one piece and "fp32" the tensor itself is read,
    so that changing it in place is writing it. ``layout``: how they lie over processes; what is read and written is the
    part of this one. ``dry``: reads copies and writes nothing.
    """

    def __init__(
        self, states: Sequence[tuple[dict[str, Any], str]], *, layout: Layout = WHOLE, dry: bool = False
    ) -> None:
        self.states, self.layout, self.dry = states, layout, dry

    def read(
        self, name: str, shape: tuple[int, ...], stored: Stored, like: Tensor, *, unsigned: bool = False
    ) -> Tensor:
        """(pieces · shape[0], …) in the dtype and on the device of ``like``; zeros where there is nothing yet."""
        found = [self._one(state, name, suffix, shape, stored, like, unsigned) for state, suffix in self.states]
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole.clone() if self.dry else whole

    def write(self, name: str, value: Tensor, stored: Stored, *, unsigned: bool = False) -> None:
        """Keeps ``value``, as :meth:`read` gave it or anew."""
        if self.dry:
            return
        parts = [value] if len(self.states) == 1 else list(value.tensor_split(len(self.states)))
        for (state, suffix), part in zip(self.states, parts, strict=True):
            if stored == "int8":
                for kind, packed in zip(("codes", "scales"), _packed(part, unsigned), strict=True):
                    state[f"{name}_{kind}{suffix}"] = self.layout.kept(f"{name}_{kind}", packed)
                continue
            kept = self._kept(state, name + suffix)
            if kept is part:
                continue
            if kept is not None and kept.shape == part.shape:
                kept.copy_(part)
            else:
                dtype = torch.bfloat16 if stored == "bf16" else part.dtype
                new = part.to(dtype, copy=len(self.states) > 1, memory_format=torch.contiguous_format)
                state[name + suffix] = self.layout.kept(name, new)

    def held(self, name: str) -> Tensor | None:
        """What a subspace keeps; None before the first fit."""
        found = [self._kept(state, name + suffix) for state, suffix in self.states]
        present = [one for one in found if one is not None]
        if len(present) < len(found):
            return None
        return present[0] if len(present) == 1 else torch.cat(present)

    def hold(self, name: str, value: Tensor) -> None:
        if not self.dry:
            for (state, suffix), part in zip(self.states, value.tensor_split(len(self.states)), strict=True):
                state[name + suffix] = self.layout.kept(name, part.clone() if len(self.states) > 1 else part)

    def _one(
        self,
        state: dict[str, Any],
        name: str,
        suffix: str,
        shape: tuple[int, ...],
        stored: Stored,
        like: Tensor,
        unsigned: bool,
    ) -> Tensor:
        if stored == "int8":
            codes = self._kept(state, f"{name}_codes{suffix}")
            if codes is None or not codes.numel():
                return torch.zeros(shape, dtype=like.dtype, device=like.device)
            scales = local(state[f"{name}_scales{suffix}"])
            return unpack(codes, scales, signed=not unsigned, block=BLOCK, dtype=like.dtype)
        kept = self._kept(state, name + suffix)
        if kept is None:
            if self.dry:
                return torch.zeros(shape, dtype=like.dtype, device=like.device)
            kept = torch.zeros(shape, dtype=torch.bfloat16 if stored == "bf16" else like.dtype, device=like.device)
            state[name + suffix] = self.layout.kept(name, kept)
        return kept.to(like.dtype)

    def _kept(self, state: dict[str, Any], key: str) -> Tensor | None:
        value = state.get(key)
        return None if value is None else local(value)


def _packed(part: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales, also of what has no entries."""
    if part.numel():
        return pack(part, signed=not unsigned, block=BLOCK)
    codes = part.to(torch.uint8 if unsigned else torch.int8)
    return codes, part.new_zeros((*part.shape[:-1], -(-part.shape[-1] // BLOCK)), dtype=torch.float32)
