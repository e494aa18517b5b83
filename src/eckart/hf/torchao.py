"""torchao's quantisation on top of Eckart's factored layers, in one checkpoint."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_torchao_available
from transformers.utils.quantization_config import TorchAoConfig

from eckart.errors import EckartError, InputError, unknown
from eckart.hf.quantizer import EckartConfig, EckartQuantizer, attach, is_torchao
from eckart.hf.registry import prepare_for_saving
from eckart.layers import Table

CONFIGS = {"int8": "Int8WeightOnlyConfig", "int8-dynamic": "Int8DynamicActivationInt8WeightConfig"}
"""torchao's configs by the names that they have here: weights alone, and activations in every forward pass too."""


def quantise_torchao(model: nn.Module, config: str | Any = "int8") -> list[str]:
    """Quantise the linear layers of a model with factored layers by torchao, in place; returns their names.

    They are all nn.Linear, so the factors of linear layers too, but those that transformers leaves alone (the head,
    tied weights), factors of embeddings, and single columns. Weights that torchao has quantised already stay as they
    are. After this, ``save_pretrained`` writes both, and ``from_pretrained`` reads both where eckart and torchao are
    installed. Weights of that kind do not learn; adapters on top of them do.

    Args:
        config: a name of ``CONFIGS``, or a config object of ``torchao.quantization``; one whose tensors torchao can
            write to safetensors.

    Raises EckartError where torchao is missing, InputError for an unknown config and for a model without layers of
    Eckart's: there, transformers' own ``TorchAoConfig`` does it.
    """
    if not is_torchao_available():
        raise EckartError("torchao is not installed: pip install torchao")
    if isinstance(config, str) and config not in CONFIGS:
        raise InputError(unknown("torchao config", config, CONFIGS))
    entries = prepare_for_saving(model)
    if not entries or not isinstance(model, PreTrainedModel):
        raise InputError(
            "this model has no factored layers. transformers quantises it by itself: "
            "from_pretrained(…, quantization_config=TorchAoConfig(…))."
        )
    torchao = importlib.import_module("torchao.quantization")
    chosen = getattr(torchao, CONFIGS[config])() if isinstance(config, str) else config
    inner = TorchAoConfig(chosen)
    kept = get_keys_to_not_convert(model)
    tables = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Table))
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features > 1  # torchao 0.18 fails on a single column
        and should_convert_module(name, kept)
        and not name.startswith(tables)
    ]
    fresh = {name for name in names if type(model.get_submodule(name).get_parameter("weight").data) is Tensor}
    torchao.quantize_(model, chosen, filter_fn=lambda module, name: name in fresh)
    attach(model, EckartQuantizer(EckartConfig(entries, inner=inner), pre_quantized=True))
    return [name for name in names if is_torchao(model.get_submodule(name).get_parameter("weight"))]
