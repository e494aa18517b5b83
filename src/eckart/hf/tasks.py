"""What each task makes of a model's output: embeddings, logits, the loss behind the moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from eckart.errors import InputError
from eckart.hf.models import LoadedModel, Pooling
from eckart.moments import LossFn, gauss_newton, sampled_targets

Batch = Mapping[str, Tensor] | Tensor


def loss_for(loaded: LoadedModel) -> LossFn:
    """The loss without labels whose gradients calibrate the model.

    Embedding models: a random projection of the normalised embeddings (Gauss-Newton of their squared
    distance). All others: cross-entropy of targets drawn from the model's own output (Fisher information).
    """
    return gauss_newton(embedding_output(loaded)) if loaded.task == "embedding" else sampled_targets


def embedding_output(loaded: LoadedModel) -> Callable[[Any, Batch], Tensor]:
    """``f(outputs, batch)``, the normalised embeddings (rows, d) of an output with token vectors."""

    def output_of(outputs: Any, batch: Batch) -> Tensor:
        hidden = _hidden(outputs)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return normalize(pool(hidden, mask, loaded.pooling), dim=-1)

    return output_of


def embed(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Normalised embeddings (rows, d) of one batch, without gradients, in float32 at least."""
    with torch.inference_mode():
        return embedding_output(loaded)(run(loaded, batch), batch)


def logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Logits (rows, …, classes) of one batch, without gradients."""
    with torch.inference_mode():
        outputs = run(loaded, batch)
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"{loaded.name} returns {type(outputs).__name__} without logits. "
            "Pass a model with a head, or evaluate it as an embedding model."
        )
    return found


def run(loaded: LoadedModel, batch: Batch) -> Any:
    """The model's own output for a batch: keyword arguments, or one tensor."""
    return loaded.model(**batch) if isinstance(batch, Mapping) else loaded.model(batch)


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector per row out of token vectors (rows, tokens, d); ``mask`` (rows, tokens) is 0 at padding."""
    hidden = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "lasttoken":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if pooling == "max":
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _hidden(outputs: Any) -> Tensor:
    """Token vectors (rows, tokens, d) of an output."""
    found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "last_hidden_state", None)
    if not isinstance(found, Tensor) or found.ndim != 3:
        raise InputError(
            f"an embedding model returns token vectors (rows, tokens, d) as last_hidden_state; "
            f"got {type(outputs).__name__}. Pass the model without its head."
        )
    return found
