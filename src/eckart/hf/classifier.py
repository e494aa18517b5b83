"""A pretrained model with a head for classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from transformers.utils import logging as transformers_logging

from eckart.errors import FileError
from eckart.hf.models import LoadedModel, load_model


def load_classifier(
    name_or_path: str,
    labels: Sequence[str],
    *,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[LoadedModel, tuple[str, ...]]:
    """The model with a head for ``labels``, and the names of the modules that are new, with weights drawn by ``seed``.

    Its task is ``logits``. Raises FileError where transformers has no such class for the model, or where weights are
    missing inside of its blocks, and what :func:`eckart.hf.models.load_model` raises.
    """
    loaded = load_model(name_or_path, dtype=dtype, device=device)
    source = str(loaded.path or loaded.name)
    names = list(labels)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would tell at length that the head is new
    try:
        config = transformers.AutoConfig.from_pretrained(
            source,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={label: i for i, label in enumerate(names)},
            trust_remote_code=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                source,
                config=config,
                dtype=loaded.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    except (ValueError, OSError) as error:
        raise FileError(f"{name_or_path} cannot be given a head for classes: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    lost = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    inside = [key for key in lost if any(part.isdigit() for part in key.split("."))]
    if inside:
        raise FileError(f"{name_or_path} does not hold all weights: {', '.join(inside[:5])} would be random.")
    new = tuple(sorted({_owner(key, model) for key in lost}))
    if model.config.pad_token_id is None and loaded.tokenizer is not None:
        model.config.pad_token_id = loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id
    model.to(loaded.device)
    return replace(loaded, model=model.eval(), task="logits"), new


def _owner(key: str, model: torch.nn.Module) -> str:
    """The module below the model, or below its backbone, that holds the parameter: ``classifier``, ``pooler``."""
    parts = key.split(".")
    backbone = getattr(model, "base_model_prefix", "")
    return parts[1] if parts[0] == backbone and len(parts) > 1 else parts[0]
