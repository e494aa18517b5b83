"""A model beside its original on texts: everything that an evaluation needs, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eckart.errors import InputError, MismatchError
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
from eckart.hf.tasks import Batch, embed, logits
from eckart.records import Evaluation, Latency, Progress, silent

Batches = Sequence[Batch]


def measure(
    loaded: LoadedModel,
    base: LoadedModel,
    data: Sequence[str] | Batches,
    *,
    samples: int | None = 300,
    length: int | None = None,
    batch_size: int = 16,
    latency: bool = True,
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """``loaded`` measured against ``base`` on texts, or on batches that are ready for both.

    Of texts, ``samples`` sentences or windows are drawn with ``seed``; both models get the tokens of the
    base's tokenizer. ``protocol`` adds what the caller knows of the data (its name, hash and part). Latency
    is taken at batch 1 and 32: of 64 random tokens, or of the first rows of the batches, repeated. Cost: one
    forward pass of both models per batch; the logits of one batch are held at a time.

    Raises MismatchError where task, tokenizer, vocabulary or device of the two differ, InputError for texts
    that are empty or too short.
    """
    _check_pair(loaded, base)
    texts = [one for one in data if isinstance(one, str)]
    batches: Batches = [one for one in data if not isinstance(one, str)]
    if texts and batches:
        raise InputError("expected texts or batches; got both in one sequence.")
    known = _models(loaded, base)
    if not batches:
        read = text_batches(base, texts, length=length, batch_size=batch_size, samples=samples, seed=seed)
        batches, known = read, known | _reading(base, read)
    compared = _compare(loaded, base, batches, seed, progress)
    times: tuple[Latency, ...] = ()
    if latency:
        output = embed if base.task == "embedding" else logits
        times = measure_latency(
            partial(output, loaded),
            partial(output, base),
            partial(_random_batch, base) if texts else partial(_repeat, batches[0]),
            length=min(LENGTH, base.max_length or LENGTH) if texts else _positions(batches[0]),
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
        protocol={**(protocol or {}), **known},
    )


def _compare(loaded: LoadedModel, base: LoadedModel, batches: Batches, seed: int, progress: Progress) -> Measured:
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

    def counted(batch: Batch) -> Tensor:
        nonlocal seen
        seen += 1
        progress("evaluate", seen, len(batches))
        return logits(base, batch)

    ours = partial(logits, loaded)
    if base.task == "causal-lm":
        row_bytes = batches.row_bytes if isinstance(batches, TextBatches) else None
        return evaluate_causal(ours, counted, _named(batches), row_bytes=row_bytes, seed=seed)
    if base.task == "masked-lm":
        tokenizer: Any = base.tokenizer
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise InputError(f"{base.name} is a masked model: pass a tokenizer that has a mask token.")
        return evaluate_masked(
            ours,
            counted,
            _named(batches),
            mask_token=tokenizer.mask_token_id,
            special=tokenizer.all_special_ids,
            seed=seed,
        )
    return evaluate_logits(ours, counted, batches, seed=seed)


def _named(batches: Batches) -> list[Mapping[str, Tensor]]:
    """Batches with names; a bare tensor is a batch of ``input_ids``."""
    return [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]


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


def _models(loaded: LoadedModel, base: LoadedModel) -> dict[str, Any]:
    known = {"base": base.name, "dtype": _dtype(loaded), "base_dtype": _dtype(base)}
    return known if base.revision is None else {**known, "base_revision": base.revision}


def _reading(base: LoadedModel, batches: TextBatches) -> dict[str, Any]:
    """What the figures depend on in the way texts became tokens."""
    known: dict[str, Any] = {
        "tokenizer": str(getattr(base.tokenizer, "name_or_path", "")) or type(base.tokenizer).__name__,
        "tokens": batches.tokens,
        "bytes": round(sum(float(part.sum()) for part in batches.row_bytes)),
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


def _repeat(batch: Batch, rows: int, length: int) -> Batch:
    """A batch of as many rows, cut from or made of copies of the given one."""
    if isinstance(batch, Tensor):
        return batch[torch.arange(rows, device=batch.device) % len(batch)]
    return {key: value[torch.arange(rows, device=value.device) % len(value)] for key, value in batch.items()}


def _positions(batch: Batch) -> int:
    """Tokens of a row; 1 where a row is no row of tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return 1 if ids is None else ids.shape[1]
