"""A model beside its original on texts: everything that an evaluation needs, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eckart.errors import MismatchError
from eckart.evaluation import (
    Measured,
    evaluate_causal,
    evaluate_embeddings,
    evaluate_logits,
    evaluate_masked,
    finish,
    measure_latency,
)
from eckart.evaluation.latency import LENGTH
from eckart.hf.batches import TextBatches, text_batches
from eckart.hf.models import LoadedModel, first_parameter
from eckart.hf.tasks import embed, logits
from eckart.records import Evaluation, Latency, Progress, silent


def measure(
    loaded: LoadedModel,
    base: LoadedModel,
    texts: Sequence[str],
    *,
    samples: int | None = 300,
    length: int | None = None,
    batch_size: int = 16,
    latency: bool = True,
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """``loaded`` measured against ``base`` on the first ``samples`` sentences or windows of the texts.

    Both get the tokens of the base's tokenizer. ``protocol`` adds what the caller knows of the data (its
    name, hash and part). Latency is taken at batch 1 and 32 with 64 tokens. Cost: one forward pass of both
    models per batch; the logits of one batch are held at a time.

    Raises MismatchError where task, tokenizer, vocabulary or device of the two differ, InputError for texts
    that are empty or too short.
    """
    _check_pair(loaded, base)
    batches = text_batches(base, texts, length=length, batch_size=batch_size, samples=samples)
    compared = _compare(loaded, base, batches, seed, progress)
    times: tuple[Latency, ...] = ()
    if latency:
        output = embed if base.task == "embedding" else logits
        times = measure_latency(
            partial(output, loaded),
            partial(output, base),
            partial(_random_batch, base),
            length=min(LENGTH, base.max_length or LENGTH),
            progress=progress,
        )
    return finish(
        base.task,
        compared,
        loaded.model,
        base.model,
        latency=times,
        model_folder=loaded.path,
        base_folder=base.path,
        protocol={**(protocol or {}), **_protocol(loaded, base, batches)},
    )


def _compare(
    loaded: LoadedModel, base: LoadedModel, batches: TextBatches, seed: int, progress: Progress
) -> Measured:
    if base.task == "embedding":
        pairs = []
        for done, batch in enumerate(batches):
            progress("evaluate", done, len(batches))
            pairs.append((embed(loaded, batch).cpu(), embed(base, batch).cpu()))
        progress("evaluate", len(batches), len(batches))
        return evaluate_embeddings(
            torch.cat([ours for ours, _ in pairs]), torch.cat([theirs for _, theirs in pairs]), seed=seed
        )
    seen = 0

    def counted(batch: Mapping[str, Tensor] | Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        progress("evaluate", seen, len(batches))
        return logits(base, batch)

    ours = partial(logits, loaded)
    if base.task == "causal-lm":
        return evaluate_causal(ours, counted, batches, row_bytes=batches.row_bytes, seed=seed)
    if base.task == "masked-lm":
        tokenizer: Any = base.tokenizer
        if tokenizer.mask_token_id is None:
            raise MismatchError(f"{base.name} is a masked model, but its tokenizer has no mask token.")
        return evaluate_masked(
            ours,
            counted,
            batches,
            mask_token=tokenizer.mask_token_id,
            special=tokenizer.all_special_ids,
            seed=seed,
        )
    return evaluate_logits(ours, counted, batches, seed=seed)


def _check_pair(loaded: LoadedModel, base: LoadedModel) -> None:
    if loaded.task != base.task:
        raise MismatchError(
            f"{loaded.name} is a model for {loaded.task}, {base.name} one for {base.task}. "
            "Evaluate against the model it was made from."
        )
    if loaded.device != base.device:
        raise MismatchError(
            f"{loaded.name} lies on {loaded.device}, {base.name} on {base.device}. Load both on one device."
        )
    if loaded.tokenizer is not None and base.tokenizer is not None:
        ours, theirs = loaded.tokenizer.get_vocab(), base.tokenizer.get_vocab()
        if ours != theirs:
            raise MismatchError(
                f"{loaded.name} and {base.name} have different tokenizers ({len(ours)} and {len(theirs)} "
                "entries). Evaluate against the model it was made from."
            )


def _protocol(loaded: LoadedModel, base: LoadedModel, batches: TextBatches) -> dict[str, Any]:
    known: dict[str, Any] = {
        "tokenizer": str(getattr(base.tokenizer, "name_or_path", "")) or type(base.tokenizer).__name__,
        "tokens": batches.tokens,
        "bytes": round(sum(float(part.sum()) for part in batches.row_bytes)),
        "dtype": _dtype(loaded),
        "base_dtype": _dtype(base),
        "base": base.name,
        "base_revision": base.revision,
    }
    if batches.unit == "window":
        return {**known, "window": batches.length, "stride": batches.length}
    return {**known, "max_tokens": batches.length, "truncated": batches.truncated, "pooling": base.pooling}


def _dtype(loaded: LoadedModel) -> str:
    return str(first_parameter(loaded.model).dtype).removeprefix("torch.")


def _random_batch(base: LoadedModel, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens of the vocabulary, the same for both models."""
    model: Any = base.model
    generator = torch.Generator().manual_seed(0)
    entries = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(entries, (rows, length), generator=generator).to(base.device)
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
