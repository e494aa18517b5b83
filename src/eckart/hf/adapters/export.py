"""An adapter as plain LoRA: what stock PEFT and vLLM load, in one uniform rank, scaling 1 and no patterns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from eckart.checkpoint import atomic_folder
from eckart.errors import EckartError, problems
from eckart.hf.adapter_files import CONFIG, WEIGHTS
from eckart.hf.adapters.layers import AdapterLayer
from eckart.hf.adapters.sharded import spread, standing_in

FOLDER = "lora"
"""Beside the files of an adapter: the same adapter as plain LoRA."""
_STEM = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """B (slices, out, k) and A (slices, k, in) of one layer, and how PEFT's LoRA stores them there."""

    B: Tensor
    A: Tensor
    layer: nn.Module
    parameter: str = ""
    """Dotted path of the weight in the model, where the layer has several: fused experts."""

    @property
    def groups(self) -> int:
        """Slices that share the rank; each expert has it for itself."""
        return 1 if self.parameter else self.B.shape[0]

    @property
    def rank(self) -> int:
        return self.groups * self.B.shape[2]

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """Under PEFT's names below the layer, filled up with zeros to ``rank``."""
        groups, m, k = self.B.shape
        each = rank // self.groups
        A, B = pad(self.A, (0, 0, 0, each - k)), pad(self.B, (0, each - k))
        if self.parameter:  # (experts · rank, in), and (out, rank · experts) with the experts next to each other
            ordered = B.permute(1, 2, 0).reshape(m, -1).contiguous()
            return {"lora_A.weight": A.reshape(-1, A.shape[2]).contiguous(), "lora_B.weight": ordered}
        if isinstance(self.layer, nn.Embedding):
            return {"lora_embedding_A": A[0].contiguous(), "lora_embedding_B": B[0].contiguous()}
        if not isinstance(self.layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return {"lora_A.weight": A[0].contiguous(), "lora_B.weight": B[0].contiguous()}
        kernel = self.layer.weight.shape[2:]
        channels = self.A.shape[2] // math.prod(kernel)
        # PEFT's inner convolution has no groups: each group's kernel lies on its own channels, with zeros elsewhere.
        inner = A.new_zeros(groups, each, groups, channels, *kernel)
        for g in range(groups):
            inner[g, :, g] = A[g].reshape(each, channels, *kernel)
        ones = (1,) * len(kernel)
        return {
            "lora_A.weight": inner.reshape(rank, groups * channels, *kernel),
            "lora_B.weight": B.reshape(groups * m, each, *ones).contiguous(),
        }


def lora_factors(
    model: nn.Module, adapter: str, weights: Path | None = None
) -> tuple[dict[str, LoraFactors], list[str]]:
    """The layers of an adapter as LoRA, by name, and a sentence for each that no LoRA can be.

    ``weights``: its file, from which numbers are read that are spread over processes.
    """
    found: dict[str, LoraFactors] = {}
    wrong: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, AdapterLayer) or adapter not in module.eckart_delta:
            continue
        base, delta = module.get_base_layer(), module.delta(adapter)
        numbers = _numbers(weights, f"{_STEM}{name}.eckart_delta.") if weights and spread(delta) else {}
        if any(p.is_meta or (spread(delta) and n not in numbers) for n, p in delta.named_parameters()):
            wrong.append(f"{name}: its numbers are spread over processes, or in none")
            continue
        with torch.no_grad(), standing_in(delta, numbers):
            factors = delta.factors() if delta.linear else None
        if factors is None:
            wrong.append(f"{name}: the method has no exact factors of low rank")
        elif isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (
            base.padding_mode != "zeros" or any(d != 1 for d in base.dilation)
        ):
            wrong.append(f"{name}: PEFT's LoRA drops the dilation and the padding mode of a convolution")
        else:
            path = delta.layout.name if delta.layout.kind == "experts" else ""
            found[name] = LoraFactors(factors[0].detach().cpu(), factors[1].detach().cpu(), base, path)
    return found, wrong


def write_lora_copy(model: nn.Module, adapter: str, folder: Path, config: Any, weights: Path) -> None:
    """Write the adapter as plain LoRA into ``folder``, whole or not at all, in place of what is there.

    ``weights``: the file of the adapter, whose modules that were trained whole go along. Raises EckartError that says
    which layers have no exact LoRA.
    """
    found, wrong = lora_factors(model, adapter, weights)
    if wrong or not found:
        raise EckartError(problems("no plain LoRA", wrong or ["the adapter has no layer"]))
    write_factors(found, folder, config, other_tensors(weights))


def write_factors(found: Mapping[str, LoraFactors], folder: Path, config: Any, others: Mapping[str, Tensor]) -> None:
    """Write factors as one LoRA of uniform rank with α = r, whole or not at all, in place of what is there."""
    step = math.lcm(*(f.groups for f in found.values()))
    rank = max(-(-f.rank // step) * step for f in found.values())
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(name for name, f in found.items() if not f.parameter),
        target_parameters=sorted(f.parameter for f in found.values() if f.parameter) or None,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=all(type(f.layer).__name__ == "Conv1D" for f in found.values()),
        modules_to_save=sorted(config.modules_to_save) if config.modules_to_save else None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    tensors = dict(others)
    for name, factors in _named(found).items():
        tensors |= {f"{_STEM}{name}.{key}": value for key, value in factors.tensors(rank).items()}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
    with atomic_folder(folder, overwrite=True) as new:
        (new / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode & 0o777)


def _named(found: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """By the names that PEFT gives: it wraps the parameters of one module into each other, the first one innermost."""
    named = {}
    chosen = {factors.parameter for factors in found.values()}
    for name, factors in found.items():
        if factors.parameter:
            name, _, own = factors.parameter.rpartition(".")
            order = [p for p, _ in factors.layer.named_parameters(recurse=False) if f"{name}.{p}" in chosen]
            name += ".base_layer" * (len(order) - 1 - order.index(own))
        named[name] = factors
    return named


def other_tensors(weights: Path) -> dict[str, Tensor]:
    """What a saved adapter holds besides the adapters themselves: modules that were trained whole."""
    if not weights.is_file():
        return {}
    with safe_open(weights, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if ".eckart_delta" not in name}  # noqa: SIM118


def _numbers(weights: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of one layer in the file of an adapter, by what follows ``stem``."""
    with safe_open(weights, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(stem)]  # noqa: SIM118
        # Cloned: numbers in a mapped file lie at any address, and products over them round otherwise.
        return {name.removeprefix(stem): file.get_tensor(name).clone() for name in names}
