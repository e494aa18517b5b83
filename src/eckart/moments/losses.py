"""Losses that need no labels, for the gradients of a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from eckart.errors import InputError

Batch = Mapping[str, Any] | Tensor
LossFn = Callable[[Any, Batch, torch.Generator], tuple[Tensor, float]]
"""``loss(outputs, batch, generator)``: the loss summed over the units of the batch, and how many units there are.
The generator is on the CPU."""

CHUNK_NUMBERS = 1 << 20
"""Probabilities that are made at a time while targets are drawn (4 MB in float32, which fits a cache)."""


def sampled_targets(outputs: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
    """Cross-entropy of targets drawn from the model's own softmax, one per position that is no padding.

    The second moments of its gradients are the Fisher information itself, not the "empirical" one of given labels,
    so ½ tr(G ΔW Σ ΔWᵀ) estimates KL(original ‖ changed) per position in nats. Units are positions.
    Needs ``outputs.logits``, or logits as the output, (…, classes); raises InputError where there are none.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"sampled_targets needs logits; the model returned {type(outputs).__name__}. "
            "For models without a head use gauss_newton."
        )
    mask = _mask(outputs, batch, logits)
    mask = None if mask is None or bool(mask.all()) else mask  # windows without padding need no copy
    flat = logits.reshape(-1, logits.shape[-1])
    flat = (flat if mask is None else flat[mask.reshape(-1) != 0]).to(torch.promote_types(logits.dtype, torch.float32))
    targets = draw(flat.detach(), generator)
    return cross_entropy(flat, targets, reduction="sum"), float(len(flat))


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(N, classes) → (N,): a class per row with probability softmax(logits), the same on every device.

    Classes lie in about √classes runs of as many. The first class up to which the probabilities come to a uniform
    number is in the first run up to which they do, so cumulated sums are needed of the runs, and inside of one.
    """
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    classes = logits.shape[-1]
    width = max(1, math.isqrt(classes))
    drawn = [torch.zeros(0, dtype=torch.int64, device=logits.device)]
    step = max(1, CHUNK_NUMBERS // classes)
    for start in range(0, len(logits), step):
        shares = pad(logits[start : start + step].softmax(-1), (0, -classes % width))
        shares = shares.reshape(len(shares), -1, width)
        runs = shares.sum(-1, dtype=precise).cumsum(-1)
        u = uniform[start : start + step].to(logits.device, precise) * runs[:, -1:]
        run = torch.searchsorted(runs, u, right=True).clamp(max=runs.shape[-1] - 1)
        before = torch.where(run > 0, runs.gather(1, (run - 1).clamp(min=0)), 0.0)
        inside = shares.gather(1, run[..., None].expand(-1, -1, width)).squeeze(1).to(precise).cumsum(-1)
        place = torch.searchsorted(inside, u - before, right=True).clamp(max=width - 1)
        drawn.append((run * width + place).squeeze(1).clamp(max=classes - 1))
    return torch.cat(drawn)


def _mask(outputs: Any, batch: Batch, logits: Tensor) -> Tensor | None:
    """The padding mask that belongs to the logits; in an encoder-decoder model that of the decoder."""
    if not isinstance(batch, Mapping):
        return None
    decodes = getattr(outputs, "encoder_last_hidden_state", None) is not None
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else None


def gauss_newton(output_of: Callable[[Any, Batch], Tensor]) -> LossFn:
    """⟨v, output⟩ with v ~ N(0, I) drawn per unit, ``output_of(outputs, batch)`` being (units, d).

    With J the derivative of the output by a layer's, E over v of the squared gradient along δ is ‖J δ‖², so
    ½ tr(G ΔW Σ ΔWᵀ) estimates half the squared change of the output per unit: 1 − cosine for normalised embeddings.
    """

    def loss(outputs: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
        output = output_of(outputs, batch)
        v = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        return (output * v).sum(), float(output.shape[0])

    loss.__qualname__ = "gauss_newton"
    return loss
