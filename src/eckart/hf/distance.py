"""How far a model's output has moved, in the unit of its predicted losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eckart.hf.models import LoadedModel
from eckart.hf.tasks import Batch, embed, logits

NUMBERS = 1 << 25
"""Numbers of the original's output that are kept at most, 128 MiB in float32."""


def distance_from_now(loaded: LoadedModel, batches: Sequence[Batch], *, seed: int = 0) -> Callable[[], float]:
    """A function that says how far the output of ``loaded.model`` is from what it is now, on these batches.

    Embedding models: half the mean squared distance of normalised embeddings, which is 1 − cosine. All others:
    KL(now ‖ then) in nats per position, on positions drawn with ``seed`` where a vocabulary is large. These are
    the units of predicted losses. Padding counts as nothing. Cost of every call: one forward pass over the batches.
    """
    before = [_output(loaded, batch) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    if loaded.task == "embedding":
        references: list[Tensor] = before
        picks: list[Tensor] = []
        entropies: list[Tensor] = []
    else:
        each = max(1, NUMBERS // (before[0].shape[-1] * len(before)))
        places = [_places(loaded, batch, output) for batch, output in zip(batches, before, strict=True)]
        picks = [found[torch.randperm(len(found), generator=generator)[:each].sort().values] for found in places]
        rows = [_picked(output, pick) for output, pick in zip(before, picks, strict=True)]
        references = [row.softmax(-1) for row in rows]
        # KL(p ‖ q) = Σ p log p − Σ p log q: the first is of the original alone.
        entropies = [_cross_entropies(p, row) for p, row in zip(references, rows, strict=True)]
        del rows
    del before

    def distance() -> float:
        total, units = 0.0, 0
        for i, (batch, reference) in enumerate(zip(batches, references, strict=True)):
            output = _output(loaded, batch)
            if loaded.task == "embedding":
                total += 0.5 * float((output - reference).square().sum())
            else:
                crossed = _cross_entropies(reference, _picked(output, picks[i]))
                total += float((crossed - entropies[i]).sum(dtype=torch.float64))
            units += len(reference)
        return max(total, 0.0) / max(units, 1)  # rounding can bring a KL of nothing below zero

    return distance


def _output(loaded: LoadedModel, batch: Batch) -> Tensor:
    found = embed(loaded, batch) if loaded.task == "embedding" else logits(loaded, batch)
    return found.detach()


def _places(loaded: LoadedModel, batch: Batch, output: Tensor) -> Tensor:
    """Flat indices of the positions that hold a token."""
    count = output[..., 0].numel()
    if isinstance(batch, Tensor):
        return torch.arange(count)
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is None or mask.numel() != count:
        return torch.arange(count)
    return mask.flatten().nonzero().squeeze(1).cpu()


def _picked(output: Tensor, places: Tensor) -> Tensor:
    """Logits (positions, classes) float32."""
    flat = output.flatten(0, -2)
    return (flat if len(places) == len(flat) else flat[places.to(output.device)]).float()


def _cross_entropies(shares: Tensor, logits: Tensor) -> Tensor:
    """−Σ p log softmax(z) of every row (positions,)."""
    products: Tensor = torch.einsum("nc,nc->n", shares, logits)
    return logits.logsumexp(-1) - products
