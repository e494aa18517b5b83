"""Which layers of a model a config asks for, and the adapter on them."""

from __future__ import annotations

import copy
from typing import Any

from peft import get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

from eckart.errors import InputError
from eckart.hf.adapters.config import AdapterConfig


def target_names(config: AdapterConfig, model: nn.Module) -> list[str]:
    """Names of the layers, by PEFT's own rules, in the model's order. Raises InputError where there is none."""
    own = copy.deepcopy(config)
    _maybe_include_all_linear_layers(own, model)
    found = [name for name, _ in model.named_modules() if name and check_target_module_exists(own, name)]
    if not found:
        raise InputError(
            f"no layer of {type(model).__name__} is meant by {config.target_modules!r}; look at its names."
        )
    return found


def put_adapter(model: nn.Module, config: AdapterConfig) -> Any:
    """PEFT's model with a fresh adapter beside the layers of ``model``, which is changed in place."""
    return get_peft_model(model, config)
