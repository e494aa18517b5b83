"""What every verb accepts as a model and as data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.data import TextData
from eckart.errors import InputError
from eckart.hf.batches import DEFAULT_SAMPLES, text_batches
from eckart.hf.datasets_source import texts_of
from eckart.hf.models import LoadedModel, load_model, wrap_model

ModelLike = str | os.PathLike[str] | nn.Module | LoadedModel
"""A folder, a hub name, a module in memory, or a model that Eckart has loaded."""

Batches = Sequence[Mapping[str, Tensor] | Tensor]
DataLike = str | os.PathLike[str] | TextData | Sequence[str] | Batches
"""A data specification such as ``stdlib:docstrings`` or ``texts.txt``, texts, or ready batches."""


def as_loaded(
    model: ModelLike, tokenizer: Any = None, *, dtype: str | None = None, device: str | None = None
) -> LoadedModel:
    """The model with its tokenizer and task. A module in memory is used as it is."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, nn.Module):
        if dtype is not None or device is not None:
            raise InputError("dtype and device say how to load a model; a module in memory has both already.")
        return wrap_model(model, tokenizer)
    return load_model(Path(model) if isinstance(model, os.PathLike) else model, dtype=dtype, device=device)


def as_texts(
    data: str | os.PathLike[str] | TextData | Sequence[str],
    *,
    part: str,
    field: str | None,
    limit: int | None,
    seed: int,
) -> TextData:
    """Texts out of whatever names them."""
    if isinstance(data, TextData):
        return data
    if isinstance(data, (str, os.PathLike)):
        return texts_of(os.fspath(data), part=part, limit=limit, seed=seed, field=field)
    return TextData.of(data, part=part)


def pieces(loaded: LoadedModel, texts: TextData) -> Sequence[str]:
    """Sentences for models that embed, the running text for the others."""
    return texts.texts if loaded.task == "embedding" else (texts.joined,)


def is_batches(data: DataLike) -> bool:
    """Whether ``data`` is a sequence of batches rather than text."""
    if isinstance(data, (str, os.PathLike, TextData)) or not isinstance(data, Sequence) or not len(data):
        return False
    return isinstance(data[0], (Tensor, Mapping))


def as_batches(
    loaded: LoadedModel,
    data: DataLike,
    *,
    part: str,
    field: str | None,
    samples: int | None,
    length: int | None,
    batch_size: int,
    seed: int,
) -> tuple[Batches, dict[str, Any]]:
    """Batches on the model's device, and what they are: data name, hash, part, length, rows."""
    if is_batches(data):
        return data, {"data": "batches in memory"}  # type: ignore[return-value]
    limit = (samples or DEFAULT_SAMPLES[loaded.task]) if loaded.task == "embedding" else None
    texts = as_texts(data, part=part, field=field, limit=limit, seed=seed)  # type: ignore[arg-type]
    wanted = samples or DEFAULT_SAMPLES[loaded.task]
    batches = text_batches(
        loaded, pieces(loaded, texts), length=length, batch_size=batch_size, samples=wanted, seed=seed
    )
    known = {
        "data": texts.name,
        "sha256": texts.sha256,
        "part": texts.part,
        "length": batches.length,
        "rows": batches.rows,
        "unit": batches.unit,
    }
    return batches.batches, known
