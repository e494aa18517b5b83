"""Makes transformers know Eckart's checkpoints, prepares models for saving, and loads folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import auto

from eckart.errors import EckartError, FileError, InputError
from eckart.hf.quantizer import QUANT_METHOD, EckartConfig, EckartQuantizer, attach, drop_lost_ties
from eckart.layers import describe


def register() -> None:
    """Register config class and quantizer under ``quant_method: "eckart"``; any number of calls is one call.

    Raises EckartError where another package took the name.
    """
    known = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD)
    if known is EckartConfig:
        return
    if known is not None and not known.__module__.startswith("eckart."):
        raise EckartError(f"quant_method {QUANT_METHOD!r} belongs to {known.__module__}; uninstall that.")
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = EckartConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = EckartQuantizer


def prepare_for_saving(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Make ``model.save_pretrained(folder)`` write the factored layers that the model holds now.

    Call it once after layers were replaced. Returns their entries (:func:`eckart.layers.describe`). A model
    without factored layers is made a plain one again. Raises InputError for a model that is no
    PreTrainedModel, or that another quantizer holds: transformers has one slot.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"expected a transformers PreTrainedModel; got {type(model).__name__}. "
            "Other modules are saved with torch.save(model.state_dict(), …)."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, EckartQuantizer):
        raise InputError(
            f"this model is held by {type(quantizer).__name__}, and transformers has room for one quantizer. "
            "Compress the model before it is quantised."
        )
    entries = describe(model)
    if not entries:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and isinstance(
                getattr(module, "hf_quantizer", None), EckartQuantizer
            ):
                module.hf_quantizer.remove_quantization_config(module)
        return {}
    drop_lost_ties(model)
    inner = None if quantizer is None else quantizer.quantization_config.inner
    attach(model, EckartQuantizer(EckartConfig(entries, inner=inner), pre_quantized=True))
    return entries


def load_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model in ``directory``, in the class that its config names, in eval mode.

    ``dtype``: None or "auto" for that of the weights, as transformers does. Raises FileError where the folder
    or its ``config.json`` is missing.
    """
    register()
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise FileError(f"expected a model folder with a config.json; {path} is none.")
    config = transformers.AutoConfig.from_pretrained(path)
    names = getattr(config, "architectures", None) or []
    classes = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    cls = classes[0] if classes else transformers.AutoModel
    if dtype is not None:
        kwargs["dtype"] = dtype
    if device_map is not None:
        kwargs["device_map"] = device_map
    model: nn.Module = cls.from_pretrained(path, **kwargs)
    return model
