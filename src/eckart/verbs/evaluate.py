"""``eckart.evaluate``: a model measured against its original."""

from __future__ import annotations

from typing import Any

from eckart.hf.batches import DEFAULT_SAMPLES
from eckart.hf.measure import measure
from eckart.records import Evaluation, Progress, silent
from eckart.verbs.models import DataLike, ModelLike, as_loaded, as_texts, is_batches, pieces


def evaluate(
    model: ModelLike,
    against: ModelLike,
    data: DataLike,
    *,
    tokenizer: Any = None,
    part: str = "evaluation",
    field: str | None = None,
    samples: int | None = 300,
    length: int | None = None,
    batch_size: int = 16,
    latency: bool = True,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure ``model`` against ``against`` on texts that neither was calibrated on.

    Embedding models: cosine, neighbour overlap at 10, rank correlation of similarities. Causal and masked
    language models: bits per byte of both, rise of the loss, KL to the original. All with 95 % bootstrap
    intervals and the protocol. Always: parameters, bytes, multiply-adds and, unless ``latency`` is False, measured
    latency at batch 1 and 32 beside the original.

    Raises MismatchError where the two models cannot be compared, InputError for data that cannot be used.
    """
    base = as_loaded(against, tokenizer, dtype=dtype, device=device)
    ours = as_loaded(model, base.tokenizer, dtype=dtype, device=device)
    limit = samples or DEFAULT_SAMPLES[base.task]
    if is_batches(data):
        return measure(ours, base, data, latency=latency, seed=seed, progress=progress)  # type: ignore[arg-type]
    texts = as_texts(
        data,  # type: ignore[arg-type]
        part=part,
        field=field,
        limit=limit if base.task == "embedding" else None,
        seed=seed,
    )
    return measure(
        ours,
        base,
        pieces(base, texts),
        samples=limit,
        length=length,
        batch_size=batch_size,
        latency=latency,
        seed=seed,
        protocol={"data": texts.name, "sha256": texts.sha256, "part": texts.part},
        progress=progress,
    )
