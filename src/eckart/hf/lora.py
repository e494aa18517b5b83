"""Low-rank repairs as PEFT's LoRA: one rank for all maps, scaling 1, in the files that PEFT reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from eckart.errors import InputError
from eckart.forms import LowRank
from eckart.hf.adapter_files import CONFIG, WEIGHTS
from eckart.hf.models import Task

_TASKS: dict[Task, str] = {"causal-lm": "CAUSAL_LM", "embedding": "FEATURE_EXTRACTION"}


def lora_config(
    forms: Mapping[str, LowRank], *, task: Task, base: str | None = None, transposed: bool = False
) -> LoraConfig:
    """The config of an adapter that adds ``forms`` to the maps of those names.

    Its rank r is the largest of the forms, and lora_alpha = r, so that B A is added as it is. ``base``: folder or hub
    name of the model that it is for. ``transposed``: the maps are ``Conv1D`` of transformers. Raises InputError without
    forms.
    """
    if not forms:
        raise InputError("an adapter needs the repair of at least one map; got none.")
    rank = max(form.rank for form in forms.values())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(forms),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        task_type=_TASKS.get(task),
        base_model_name_or_path=base,
        inference_mode=True,
    )


def lora_tensors(forms: Mapping[str, LowRank], rank: int) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank) of every map under PEFT's names, filled up with zeros."""
    tensors = {}
    for name, form in forms.items():
        missing = rank - form.rank
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = pad(form.a, (0, 0, 0, missing)).contiguous()
        tensors[f"{stem}.lora_B.weight"] = pad(form.b, (0, missing)).contiguous()
    return tensors


def write_lora(folder: Path, config: LoraConfig, forms: Mapping[str, LowRank]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing folder."""
    # PEFT keeps names in sets, which have another order in every process; files should not.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = folder / WEIGHTS
    weights.touch()
    mode = weights.stat().st_mode & 0o777  # what the umask allows; safetensors would leave 0600
    save_file({name: t.cpu() for name, t in lora_tensors(forms, config.r).items()}, weights, metadata={"format": "pt"})
    weights.chmod(mode)


def attach_lora(model: nn.Module, config: LoraConfig, forms: Mapping[str, LowRank]) -> PeftModel:
    """``model`` with the adapter beside its maps, in place: what ``PeftModel.from_pretrained`` makes of the files."""
    own = copy.copy(config)
    own.base_model_name_or_path = None  # PEFT fills in the name of the model, and warns where it had another
    attached: Any = get_peft_model(model, own)
    with torch.no_grad():
        found = set_peft_model_state_dict(attached, lora_tensors(forms, config.r))
    if found.unexpected_keys:
        raise InputError(f"PEFT did not take {found.unexpected_keys[0]}; the model is not the one that was repaired.")
    return attached.eval()
