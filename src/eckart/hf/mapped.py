"""Models whose weights stay in their files: built without numbers, then pointed at the mapped safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils.hub import convert_file_size_to_int

from eckart.checkpoint.weights import DTYPES, Weights, open_weights
from eckart.errors import FileError, InputError
from eckart.hf.quantizer import EckartConfig, put_skeletons
from eckart.layers import describe

_INSTEAD = "Leave out --stream, on a machine that holds the model in memory."


def map_pretrained(cls: Any, source: Path, config: Any) -> nn.Module:
    """The model in a folder with every parameter a view of its file, in evaluation mode, without gradients.

    No weight is read: a model larger than memory opens in seconds. Buffers that a checkpoint does not hold, such
    as rotary frequencies, are computed as the class does. Raises FileError for files that are not whole and for
    weights that would be missing; InputError for checkpoints that transformers would convert while loading
    (quantised, renamed or split weights, mixed dtypes).
    """
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{source} is quantised or compressed already; streaming starts from a plain checkpoint.")
    weights = open_weights(source)
    stored = {info.dtype for info in weights.infos.values() if info.dtype.startswith(("F", "BF"))}
    if len(stored) != 1 or not stored <= set(DTYPES):
        raise InputError(
            f"{source} stores weights as {', '.join(sorted(stored)) or 'no floats'}; streaming needs one dtype of 16 "
            f"bits or more for all. {_INSTEAD}"
        )
    config.dtype = DTYPES[stored.pop()]
    model = empty_model(cls, config)
    missing = _attach(model, weights)
    if missing and all("pooler" in name for name in missing):
        # As when it is loaded: without the option there would be a pooler of random weights.
        model = empty_model(cls, config, add_pooling_layer=False)
        missing = _attach(model, weights)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FileError(
            f"{source} does not hold {shown} of {type(model).__name__} under these names: they are missing, or "
            f"transformers renames or fuses weights while loading, which streaming does not. {_INSTEAD}"
        )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()


def empty_model(cls: Any, config: Any, **keywords: Any) -> nn.Module:
    """The model that ``config`` describes: parameters on the meta device, buffers real."""
    build = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    with _parameters_on_meta():
        model: nn.Module = build(config, dtype=config.dtype, **keywords)
    return model


def factored_like(model: nn.Module, source: Path, entries: dict[str, dict[str, Any]]) -> nn.Module:
    """What ``model`` from ``source`` becomes with the factored layers of ``entries``, without numbers.

    Its config is what belongs into ``config.json``.
    """
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.dtype = model.config.dtype
    config.architectures = [type(model).__name__]
    keywords = {"add_pooling_layer": False} if getattr(model, "pooler", ...) is None else {}
    with torch.device("meta"):
        empty = empty_model(type(model), config, **keywords)
        if entries:
            put_skeletons(empty, entries)
            config.quantization_config = EckartConfig(describe(empty))
    return empty


def copy_companions(model: nn.Module, tokenizer: Any, source: Path, folder: Path) -> None:
    """Write config, tokenizer and defaults of ``generate`` beside the weights of ``model``."""
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    defaults = source / transformers.utils.GENERATION_CONFIG_NAME
    if defaults.is_file():
        shutil.copyfile(defaults, folder / defaults.name)


def parse_size(text: str) -> int:
    """Bytes out of ``5GB`` or ``200MB``, as save_pretrained reads them. Raises InputError for anything else."""
    try:
        size = int(convert_file_size_to_int(text))
    except ValueError as error:
        raise InputError(f"expected a size such as 5GB; got {text!r}.") from error
    if size < 1:
        raise InputError(f"a weight file holds at least one byte; got {text!r}.")
    return size


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers loses its numbers at once, before anything fills them in."""
    usual = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        usual(self, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]


def _attach(model: nn.Module, weights: Weights) -> list[str]:
    """Point every parameter and stored buffer at its tensor; returns the parameters that have none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    shared: dict[int, list[str]] = {}
    places: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
        places[id(parameter)] = parameter
    missing = []
    for key, names in shared.items():
        stored = _stored(names, prefix, weights)
        if stored is None:
            missing.append(names[0])
            continue
        tensor = _fitting(weights, stored, names[0], tuple(places[key].shape))
        new = nn.Parameter(tensor, requires_grad=False)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = new
    persistent = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        stored = _stored([name], prefix, weights) if name in persistent else None
        if stored is not None:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = _fitting(weights, stored, name, tuple(buffer.shape))
    return missing


def _stored(names: list[str], prefix: str, weights: Weights) -> str | None:
    """The name under which one of these lies in the files, with or without the prefix of the bare model."""
    tries = [candidate for name in names for candidate in (name, name.removeprefix(prefix), prefix + name)]
    return next((name for name in tries if name in weights.infos), None)


def _fitting(weights: Weights, stored: str, name: str, shape: tuple[int, ...]) -> Tensor:
    if weights.infos[stored].shape != shape:
        raise FileError(
            f"{weights.folder}: {stored} has shape {list(weights.infos[stored].shape)}, and {name} of the model "
            f"{list(shape)}. Check that config.json belongs to these weights."
        )
    return weights[stored]
