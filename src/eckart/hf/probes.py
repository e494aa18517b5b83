"""Small inputs of any shape for a model, with padding: what an exported model is compared on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import InputError

TEXT = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of models that read text, in the order in which they are exported."""


def input_names(model: nn.Module, wanted: Iterable[str] = TEXT) -> tuple[str, ...]:
    """The inputs that ``model.forward`` takes: ``pixel_values``, or those of ``wanted`` that it knows.

    A pair of encoder and decoder gets ``decoder_input_ids`` as well. Raises InputError for other inputs.
    """
    takes = inspect.signature(model.forward).parameters
    if "input_ids" in takes:
        names = [name for name in TEXT if name in takes and name in {"input_ids", "attention_mask", *wanted}]
        paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return (*names, "decoder_input_ids") if paired and "decoder_input_ids" in takes else tuple(names)
    if "pixel_values" in takes:
        return ("pixel_values",)
    kind = type(model).__name__
    raise InputError(f"{kind} reads {next(iter(takes), 'nothing')}; expected a model of input_ids or pixel_values.")


def probe(model: Any, names: Iterable[str], rows: int, length: int) -> dict[str, Tensor]:
    """Random inputs for ``names``: (rows, length) tokens, or (rows, channels, height, width) pixels.

    Every row but the first ends in padding, a third of its length; the same numbers at every call. ``length``
    is left out of account for pixels, whose size is that of the config; 8 · length where it names none.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "pixel_values":
            height, width = image_size(config) or (8 * length, 8 * length)
            channels = getattr(config, "num_channels", 3)
            found[name] = torch.randn(rows, channels, height, width, generator=generator)
        elif name in ("input_ids", "decoder_input_ids"):
            entries = model.get_input_embeddings().weight.shape[0]
            found[name] = torch.randint(entries, (rows, length), generator=generator)
        elif name == "attention_mask":
            found[name] = torch.ones(rows, length, dtype=torch.long)
            found[name][1:, length - length // 3 :] = 0
        else:
            second = int(getattr(config, "type_vocab_size", 1) > 1)
            found[name] = torch.zeros(rows, length, dtype=torch.long)
            found[name][:, length // 2 :] = second
    return found


def image_size(config: Any) -> tuple[int, int] | None:
    """(height, width) that the config names, None for models of images of any size."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (size[0], size[1])
