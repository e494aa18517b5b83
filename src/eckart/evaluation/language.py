"""Language models against their original: loss, bits, and the distance of the two predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.evaluation.bootstrap import bootstrap, resample
from eckart.evaluation.measured import Forward, Measured, few_units, wide
from eckart.records import Interval

_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the scored positions of each unit, (n,) float64 each."""

    positions: Tensor
    loss: Tensor
    """−log p(target) of the model, nats; zero where there are no targets."""
    loss_base: Tensor
    kl: Tensor
    """KL(original ‖ model), nats."""
    agreement: Tensor
    """Positions where both find the same class the most likely."""


def compare_logits(model: Tensor, base: Tensor, scored: Tensor, targets: Tensor | None = None) -> Sums:
    """Sums per row over the positions where ``scored`` (rows, positions) is true.

    ``model`` and ``base`` are logits (rows, positions, classes), ``targets`` (rows, positions) class numbers.
    Works through 4 M logits at a time, in float32 at least, and keeps sums only.

    Raises MismatchError where the two have different vocabularies, NotFiniteError for logits with NaN or Inf
    at a scored position of the loss.
    """
    if model.shape != base.shape:
        raise MismatchError(
            f"the model gives logits {tuple(model.shape)} (rows, positions, vocabulary) and the original "
            f"{tuple(base.shape)}. Expected one vocabulary; evaluate against the model it was made from."
        )
    rows, where = scored.nonzero(as_tuple=True)
    sums = torch.zeros(4, len(scored), dtype=torch.float64)
    step = max(1, _CHUNK // model.shape[-1])
    for start in range(0, len(rows), step):
        row, position = rows[start : start + step], where[start : start + step]
        log_q, log_p = (_log_softmax(x[row, position]) for x in (model, base))
        figures = torch.zeros(4, len(row), dtype=torch.float64)
        figures[2] = (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().cpu()
        figures[3] = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double().cpu()
        if targets is not None:
            target = targets[row, position].unsqueeze(-1)
            figures[0] = -log_q.gather(-1, target).squeeze(-1).double().cpu()
            figures[1] = -log_p.gather(-1, target).squeeze(-1).double().cpu()
        if not bool(torch.isfinite(figures).all()):
            raise NotFiniteError("the logits of the model or of the original hold NaN or Inf. Check its dtype.")
        sums.index_add_(1, row.cpu(), figures)
    return Sums(
        positions=scored.sum(dim=1).double().cpu(),
        loss=sums[0],
        loss_base=sums[1],
        kl=sums[2],
        agreement=sums[3],
    )


def evaluate_causal(
    model: Forward,
    base: Forward,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    row_bytes: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Measured:
    """A causal language model against its original on windows of running text.

    ``model`` and ``base`` map a batch with ``input_ids`` (windows, tokens) to logits (windows, tokens,
    vocabulary); every token but the first is predicted from those before it in its window. ``row_bytes``
    holds, for each batch, the UTF-8 bytes (windows,) behind the predicted tokens; without it there are no
    bits per byte.

    Figures: ``bits_per_byte`` and ``bits_per_byte_base``; ``loss``, ``loss_base``, ``loss_rise`` and ``kl``
    (KL of the original from the model) in nats per token; ``agreement``, the share of tokens where both
    find the same token the most likely. Intervals are bootstrapped over windows, paired. One batch of
    logits of both models is held at a time.

    Raises MismatchError for different vocabularies, InputError for no batches.
    """
    parts: list[Sums] = []
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        parts.append(compare_logits(model(batch)[:, :-1], base(batch)[:, :-1], mask[:, 1:] > 0, ids[:, 1:]))
    sums = _join(parts)
    counts = resample(len(sums.positions), seed=seed)
    metrics: dict[str, Interval] = {}
    if row_bytes is not None:
        size = torch.cat([part.double().cpu() for part in row_bytes])
        for name, nats in (("bits_per_byte", sums.loss), ("bits_per_byte_base", sums.loss_base)):
            metrics[name] = bootstrap(nats / math.log(2), size, counts=counts, unit="bits per byte")
    metrics |= _figures(sums, counts, "nats per token")
    return _language(metrics, sums, "window", "predicted_tokens", seed)


def evaluate_masked(
    model: Forward,
    base: Forward,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    mask_token: int,
    special: Iterable[int] = (),
    share: float = 0.15,
    seed: int = 0,
) -> Measured:
    """A masked language model against its original: tokens are hidden, and both guess the same ones.

    Of each row a ``share`` of the tokens (at least one) is replaced by ``mask_token``, drawn with ``seed``;
    tokens in ``special`` and padding are never hidden. The batches must hold ``input_ids``.

    Figures: ``bits_per_masked_token`` and ``bits_per_masked_token_base``; ``loss``, ``loss_base``,
    ``loss_rise`` and ``kl`` in nats per masked token; ``agreement``. Intervals over rows, paired.
    Raises MismatchError for different vocabularies, InputError for a row without a token to hide.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[Sums] = []
    never = torch.tensor(sorted({mask_token, *special}))
    for batch in batches:
        ids = batch["input_ids"]
        free = ~torch.isin(ids.cpu(), never)
        if "attention_mask" in batch:
            free &= batch["attention_mask"].cpu() > 0
        hidden = draw_mask(free, share, generator).to(ids.device)
        seen = {**batch, "input_ids": ids.masked_fill(hidden, mask_token)}
        parts.append(compare_logits(model(seen), base(seen), hidden, ids))
    sums = _join(parts)
    counts = resample(len(sums.positions), seed=seed)
    metrics = {
        name: bootstrap(nats / math.log(2), sums.positions, counts=counts, unit="bits per masked token")
        for name, nats in (
            ("bits_per_masked_token", sums.loss),
            ("bits_per_masked_token_base", sums.loss_base),
        )
    }
    metrics |= _figures(sums, counts, "nats per masked token")
    measured = _language(metrics, sums, "row", "masked_tokens", seed)
    return Measured(metrics=metrics, protocol={**measured.protocol, "masked_share": share}, warnings=measured.warnings)


def draw_mask(free: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(rows, tokens): true at a share of the free positions of each row, at least at one."""
    if not 0 < share <= 1:
        raise InputError(f"the share of masked tokens lies in (0, 1]; got {share}.")
    if not bool(free.any(dim=1).all()):
        raise InputError("a row has only special tokens, so there is none to mask. Drop empty texts.")
    order = torch.rand(free.shape, generator=generator, dtype=torch.float64).masked_fill(~free, 2.0)
    place = order.argsort(dim=1).argsort(dim=1)
    wanted = (free.sum(dim=1, keepdim=True) * share).round().clamp(min=1)
    return (place < wanted) & free


def evaluate_logits(
    model: Forward, base: Forward, batches: Iterable[Mapping[str, Tensor] | Tensor], *, seed: int = 0
) -> Measured:
    """Any other model with logits (rows, classes) or (rows, positions, classes) against its original.

    Figures: ``kl`` (KL of the original from the model, nats per position) and ``agreement``, the share of
    positions where both find the same class the most likely. Where ``attention_mask`` or
    ``decoder_attention_mask`` fits the logits, padding is left out. Intervals over rows.
    Raises MismatchError for logits of different shapes, InputError for no batches.
    """
    parts: list[Sums] = []
    for batch in batches:
        ours, theirs = (x.unsqueeze(1) if x.ndim == 2 else x for x in (model(batch), base(batch)))
        if ours.ndim != 3:
            raise InputError(f"expected logits (rows, classes) or (rows, positions, classes); got {tuple(ours.shape)}.")
        parts.append(compare_logits(ours, theirs, _positions(batch, ours)))
    sums = _join(parts)
    counts = resample(len(sums.positions), seed=seed)
    metrics = {
        "kl": bootstrap(sums.kl, sums.positions, counts=counts, unit="nats per position"),
        "agreement": bootstrap(sums.agreement, sums.positions, counts=counts),
    }
    return _language(metrics, sums, "row", "positions", seed)


def _positions(batch: Mapping[str, Tensor] | Tensor, logits: Tensor) -> Tensor:
    """(rows, positions): true where the output is not padding."""
    for key in ("decoder_attention_mask", "attention_mask"):
        mask = batch.get(key) if isinstance(batch, Mapping) else None
        if mask is not None and mask.shape == logits.shape[:2]:
            return mask > 0
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _join(parts: Sequence[Sums]) -> Sums:
    if not parts:
        raise InputError("there is nothing to evaluate on: no batches. Give more data or a smaller length.")
    names = ("positions", "loss", "loss_base", "kl", "agreement")
    return Sums(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _figures(sums: Sums, counts: Tensor, unit: str) -> dict[str, Interval]:
    return {
        "loss": bootstrap(sums.loss, sums.positions, counts=counts, unit=unit),
        "loss_base": bootstrap(sums.loss_base, sums.positions, counts=counts, unit=unit),
        "loss_rise": bootstrap(sums.loss - sums.loss_base, sums.positions, counts=counts, unit=unit),
        "kl": bootstrap(sums.kl, sums.positions, counts=counts, unit=unit),
        "agreement": bootstrap(sums.agreement, sums.positions, counts=counts),
    }


def _language(metrics: Mapping[str, Interval], sums: Sums, unit: str, scored: str, seed: int) -> Measured:
    n = len(sums.positions)
    return Measured(
        metrics=metrics,
        protocol={
            "unit": unit,
            f"{unit}s": n,
            scored: int(sums.positions.sum()),
            "bootstrap": f"over {unit}s, paired",
            "seed": seed,
        },
        warnings=(*few_units(n, unit), *wide(metrics, {"loss_rise": 0.2, "kl": 0.2, "agreement": 0.1})),
    )
