"""Which rows of a tensor are tokens, and which half of the data they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.errors import InputError

Picks = tuple[Tensor, Tensor]
"""Indices of the rows of half A and of half B; padding is in neither."""


def _mask(batch: Mapping[str, Any], name: str) -> Tensor | None:
    mask = batch.get(name)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise InputError(
            f"{name} marks padding and must be a tensor of shape (batch, tokens); "
            f"got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
        )
    return mask != 0


def _tokens_in(sample: Tensor) -> int:
    """The ids of a text; for anything else its rows."""
    return sample.numel() if sample.ndim == 2 and not sample.is_floating_point() else sample.shape[0]


@dataclass(frozen=True)
class BatchTokens:
    """The rows of one batch. Even rows, counted over all batches, are half A, odd ones half B.

    Sequences go to one half whole: tokens of one text are too much alike to validate each other.
    """

    rows: int
    first: int
    """How many rows came in batches before."""
    mask: Tensor | None
    """(batch, tokens): True where there is a token; None where all count."""
    decoder_mask: Tensor | None
    tokens: int

    @classmethod
    def of(cls, batch: Mapping[str, Any] | Tensor, first: int) -> BatchTokens:
        if isinstance(batch, Tensor):
            if batch.ndim == 0 or batch.numel() == 0:
                raise InputError(f"a batch has the shape (batch, …) and holds numbers; got {tuple(batch.shape)}.")
            return cls(batch.shape[0], first, None, None, _tokens_in(batch))
        mask, decoder_mask = _mask(batch, "attention_mask"), _mask(batch, "decoder_attention_mask")
        leading = [v for v in batch.values() if isinstance(v, Tensor) and v.ndim > 0]
        if not leading:
            raise InputError("a batch is a tensor or a mapping with at least one tensor of shape (batch, …).")
        sample = mask if mask is not None else batch.get("input_ids", leading[0])
        if sample.numel() == 0:
            raise InputError(f"a batch holds no token: its shape is {tuple(sample.shape)}. Leave it out.")
        tokens = _tokens_in(sample) if mask is None else int(mask.sum())
        return cls(sample.shape[0], first, mask, decoder_mask, tokens)

    def picks(self, leading: tuple[int, ...], device: torch.device, *, decoder: bool) -> tuple[Picks, bool]:
        """Rows of a tensor (*leading, d), flattened to (N, d), by half; and whether a mask was left unused.

        Masked are (batch, tokens, …) and the flattened (batch · tokens,). Pooled inputs, (batch,), have no
        padding. Anything else, such as windows of an image, counts whole.
        """
        n = math.prod(leading)
        mask = self.decoder_mask if decoder else self.mask
        per_row = max(n // self.rows, 1) if n % self.rows == 0 else 1
        row = torch.arange(n) // per_row
        half = (row + self.first) % 2
        unused = False
        if mask is not None:
            shape = tuple(mask.shape)
            if leading[:2] == shape:
                keep = mask.cpu().reshape(-1).repeat_interleave(n // mask.numel())
                half = half.masked_fill(~keep, -1)
            elif leading == (mask.numel(),):
                half = half.masked_fill(~mask.cpu().reshape(-1), -1)
            else:
                unused = leading != (self.rows,) and not bool(mask.all())
        a, b = ((half == h).nonzero().squeeze(1).to(device) for h in (0, 1))
        return (a, b), unused
