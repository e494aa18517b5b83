"""Losses that need no labels, for the gradients of a calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.errors import InputError

Batch = Mapping[str, Any] | Tensor
LossFn = Callable[[Any, Batch, torch.Generator], tuple[Tensor, float]]
"""``loss(outputs, batch, generator)``: the loss summed over the units of the batch, and how many units there are."""


def sampled_targets(outputs: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
    """Cross-entropy of targets drawn from the model's own softmax, one per unmasked position.

    The second moments of its gradients are the true Fisher information, so ½ tr(G ΔW Σ ΔWᵀ) estimates
    KL(original ‖ changed) per position in nats. Needs ``outputs.logits``, or logits as the output, (…, classes).
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"sampled_targets needs logits; the model returned {type(outputs).__name__}. "
            "For models without a head use gauss_newton."
        )
    flat = logits.reshape(-1, logits.shape[-1]).float()
    mask = None
    if isinstance(batch, Mapping):
        names = ("decoder_attention_mask", "attention_mask")
        found = (batch[name] for name in names if isinstance(batch.get(name), Tensor))
        mask = next((m for m in found if m.shape == logits.shape[:-1]), None)
    if mask is not None:
        flat = flat[mask.reshape(-1) != 0]
    with torch.no_grad():
        cumulated = flat.softmax(-1).cumsum(-1)
        drawn = torch.rand(len(flat), 1, generator=generator).to(flat.device) * cumulated[:, -1:]
        targets = torch.searchsorted(cumulated, drawn).squeeze(1).clamp(max=flat.shape[-1] - 1)
    return cross_entropy(flat, targets, reduction="sum"), float(len(flat))


def gauss_newton(output_of: Callable[[Any, Batch], Tensor]) -> LossFn:
    """⟨v, output⟩ with v ~ N(0, I) drawn per unit, ``output_of(outputs, batch)`` being (units, d).

    E over v of its squared directional derivative is ‖J δ‖², so ½ tr(G ΔW Σ ΔWᵀ) estimates half the squared change of
    the output: 1 − cosine for normalised embeddings.
    """

    def loss(outputs: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
        output = output_of(outputs, batch)
        v = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        return (output * v).sum(), float(output.shape[0])

    return loss
