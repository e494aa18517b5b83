"""Adapters that are no LoRA, as the nearest one: what it costs in accuracy is measured on the model's own output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from eckart.errors import EckartError, FileError, InputError, problems
from eckart.hf.adapter_files import CONFIG, WEIGHTS
from eckart.hf.adapters.config import PEFT_TYPE, AdapterConfig
from eckart.hf.adapters.export import LoraFactors, lora_factors
from eckart.hf.adapters.tuner import adapter_layers
from eckart.linalg import leading_svd

ADAPTER = "default"


def read_config(folder: Path) -> AdapterConfig:
    """The config of a saved adapter of Eckart. Raises FileError where there is none, InputError for another kind."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileError(f"{folder} holds no adapter: expected {CONFIG} and {WEIGHTS}.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, AdapterConfig):
        kind = getattr(config, "peft_type", "unknown")
        raise InputError(f"{folder} holds an adapter of PEFT's kind {kind}; expected one of Eckart ({PEFT_TYPE}).")
    return config


def attach(base: nn.Module, folder: Path) -> Any:
    """``base`` with the adapter of a folder, of any kind that PEFT knows, beside its layers, in evaluation mode.

    Raises InputError where it does not fit.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder), adapter_name=ADAPTER).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"the adapter of {folder} does not fit this base model: {error}") from error


def exact_factors(model: nn.Module) -> dict[str, LoraFactors] | None:
    """The adapter as a LoRA, or None where it is none in some layer. ``model`` is the one that PEFT wraps."""
    found, wrong = lora_factors(model, ADAPTER)
    return None if wrong else found


class Nearest:
    """Truncated SVDs of the changes ΔW of all layers, once, for LoRAs of any rank up to ``most``.

    Raises EckartError that names the layers whose adapters are no change of a weight, and those that PEFT's LoRA cannot
    serve.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        exact, wrong = lora_factors(model, ADAPTER)
        layers = dict(adapter_layers(model, ADAPTER))
        faults = [f"{n}: not linear in its input" for n, layer in layers.items() if not layer.delta(ADAPTER).linear]
        faults += [fault for fault in wrong if "PEFT's LoRA drops" in fault or "spread over processes" in fault]
        for name, layer in layers.items():
            base = layer.get_base_layer()
            odd = getattr(base, "padding_mode", "zeros") != "zeros" or any(
                d != 1 for d in getattr(base, "dilation", ()) or ()
            )
            if odd and name not in exact:
                faults.append(f"{name}: PEFT's LoRA drops the dilation and the padding mode of a convolution")
        if faults or not layers:
            raise EckartError(problems("no LoRA is near this adapter", faults or ["it has no layer"]))
        self.bases: dict[str, tuple[nn.Module, str]] = {}
        """The layers, and paths of their weights where they have several."""
        for name, layer in layers.items():
            layout = layer.delta(ADAPTER).layout
            self.bases[name] = (layer.get_base_layer(), layout.name if layout.kind == "experts" else "")
        self.parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """Per slice, U √S (out, k) and √S Vh (k, in)."""
        self.norms: dict[str, float] = {}
        self.kept: dict[str, Tensor] = {}
        """Σ over slices of the squared singular values, cumulated."""
        for name, layer in layers.items():
            with torch.no_grad():
                change = layer.delta(ADAPTER).delta().detach().cpu().double()
            if not change.isfinite().all():
                raise EckartError(f"{name}: NaN or Inf in the adapter.")
            k = min(most, *change.shape[1:])
            found = [leading_svd(matrix, k) for matrix in change]
            self.parts[name] = [(f.U * f.S.sqrt(), f.S.sqrt()[:, None] * f.Vh) for f in found]
            self.norms[name] = float(change.square().sum())
            self.kept[name] = torch.stack([f.S.double().square() for f in found]).sum(0).cumsum(0)

    def factors(self, rank: int) -> dict[str, LoraFactors]:
        """The nearest LoRA with at most ``rank`` directions in each layer, shared by its groups, and in each expert."""
        found = {}
        for name, parts in self.parts.items():
            k = self._each(name, rank)
            B, A = torch.stack([b[:, :k] for b, _ in parts]), torch.stack([a[:k] for _, a in parts])
            found[name] = LoraFactors(B.float(), A.float(), *self.bases[name])
        return found

    def _each(self, name: str, rank: int) -> int:
        """Directions of one slice."""
        return rank if self.bases[name][1] else max(1, rank // len(self.parts[name]))

    def weight_errors(self, rank: int) -> dict[str, float]:
        """‖ΔW − BA‖_F / ‖ΔW‖_F of every layer; 0 where ΔW is zero."""
        errors = {}
        for name, total in self.norms.items():
            k = min(self._each(name, rank), self.kept[name].numel())
            left = max(total - float(self.kept[name][k - 1]), 0.0)
            errors[name] = (left / total) ** 0.5 if total > 0 else 0.0
        return errors


def outputs(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What the model gives for the batches, one flat float64 vector of all places that are not padding."""
    found = []
    with torch.inference_mode():
        for batch in batches:
            result = model(**batch)
            first = result.logits if getattr(result, "logits", None) is not None else result[0]
            if first.ndim == 3 and "attention_mask" in batch:
                first = first[batch["attention_mask"].bool()]
            found.append(first.double().flatten().cpu())
    return torch.cat(found)


def lost(converted: Tensor, adapted: Tensor, base: Tensor) -> float:
    """‖converted − adapted‖ / ‖adapted − base‖ of outputs: the share of what the adapter does that went wrong."""
    effect = float((adapted - base).norm())
    error = float((converted - adapted).norm())
    return error / effect if effect > 0 else (0.0 if error == 0 else float("inf"))
