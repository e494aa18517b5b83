"""Models whose weights stay in their files: built without numbers, then pointed at the mapped safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.utils.hub import convert_file_size_to_int

from eckart.checkpoint.weights import DTYPES, Weights, open_weights
from eckart.errors import FileError, InputError
from eckart.hf.native import settle_native
from eckart.hf.quantizer import EckartConfig, put_skeletons
from eckart.layers import describe

_INSTEAD = "Leave out --stream, on a machine that holds the model in memory."
_SOURCES = "_eckart_sources"
"""Attribute of a mapped model: a :class:`Sources`."""


@dataclass(frozen=True)
class Stack:
    """A fused expert weight (experts, out, in) whose matrices lie in the files one by one."""

    parts: tuple[tuple[str, ...], ...]
    """Names in the files: per part (gate, up), of which the rows follow each other, one per expert."""
    shape: tuple[int, int, int]

    def build(self, weights: Weights, dtype: torch.dtype) -> Tensor:
        """The fused weight, in memory."""
        found = torch.empty(self.shape, dtype=dtype)
        start = 0
        for names in self.parts:
            rows = weights.infos[names[0]].shape[0]
            for expert, name in enumerate(names):
                found[expert, start : start + rows] = weights[name]
            start += rows
        return found

    def at_steps(self, weights: Weights, step: int) -> Tensor:
        """Entries 0, step, 2 step, … of the flattened weight, without building it."""
        _, rows, columns = self.shape
        owner = [(names, row) for names in self.parts for row in range(weights.infos[names[0]].shape[0])]
        found = []
        for place in range(0, self.shape[0] * rows * columns, step):
            expert, inside = divmod(place, rows * columns)
            names, row = owner[inside // columns]
            found.append(weights[names[expert]][row, inside % columns])
        return torch.stack(found)


@dataclass(frozen=True)
class Sources:
    """Where the weights of a mapped model lie under names that are not the model's own."""

    weights: Weights
    names: Mapping[str, str]
    """Parameter to tensor of the files, where transformers renames it."""
    stacks: Mapping[str, Stack]
    """Parameters that hold numbers only inside of :func:`filled`."""

    def stored(self, key: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of the files that make up a parameter; none where it has its own name."""
        if key in self.stacks:
            names = [name for part in self.stacks[key].parts for name in part]
        else:
            names = [self.names[key]] if key in self.names else []
        return {name: self.weights.infos[name].shape for name in names}

    def at_steps(self, dtype: torch.dtype) -> dict[str, Any]:
        """For :func:`eckart.arch.fingerprint`."""
        return {
            name: lambda step, stack=stack: stack.at_steps(self.weights, step).to(dtype)
            for name, stack in self.stacks.items()
        }


def sources(model: nn.Module) -> Sources | None:
    """What is known of a model that :func:`map_pretrained` gave; None for any other."""
    found = model.__dict__.get(_SOURCES)
    return found if isinstance(found, Sources) else None


@contextmanager
def filled(model: nn.Module, below: str) -> Iterator[None]:
    """The experts inside of the module ``below`` have their numbers while this is open; memory: those weights."""
    known = sources(model)
    inside = {} if known is None else {k: v for k, v in known.stacks.items() if k.startswith(f"{below}.")}
    empty = {}
    try:
        for name, stack in inside.items():
            owner, _, leaf = name.rpartition(".")
            parameters = model.get_submodule(owner)._parameters
            empty[name] = parameters[leaf]
            dtype = model.get_parameter(name).dtype
            assert known is not None
            parameters[leaf] = nn.Parameter(stack.build(known.weights, dtype), requires_grad=False)
        yield
    finally:
        for name, parameter in empty.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = parameter


def map_pretrained(cls: Any, source: Path, config: Any) -> nn.Module:
    """The model in a folder with every parameter a view of its file, in evaluation mode, without gradients.

    No weight is read: a model larger than memory opens in seconds. Buffers that a checkpoint does not hold, such
    as rotary frequencies, are computed as the class does. Experts that lie in the files one by one stay without
    numbers outside of :func:`filled`. Raises FileError for files that are not whole and for weights that would be
    missing; InputError for checkpoints that are quantised or mix dtypes.
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
            f"{source} does not hold {shown} of {type(model).__name__}: they are missing, or transformers computes "
            f"them while loading in a way that streaming does not know (it knows other names, and experts that are "
            f"stacked). {_INSTEAD}"
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
            if not settle_native(empty):  # evenly narrower MLPs need no Eckart to load
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
    renamed, stacks = _converted(model, weights)
    missing = []
    for key, names in shared.items():
        if names[0] in stacks:
            continue
        stored = next((renamed[name] for name in names if name in renamed), None) or _stored(names, prefix, weights)
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
        stored = renamed.get(name) or _stored([name], prefix, weights) if name in persistent else None
        if stored is not None:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = _fitting(weights, stored, name, tuple(buffer.shape))
    model.__dict__[_SOURCES] = Sources(weights, renamed, stacks)
    return missing


def _converted(model: nn.Module, weights: Weights) -> tuple[dict[str, str], dict[str, Stack]]:
    """What transformers would rename, and what it would stack, while loading: by name of the parameter.

    Anything else that it converts is left out, and so found to be missing.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    here = model.state_dict()
    renamed: dict[str, str] = {}
    pieces: dict[str, dict[str, list[str]]] = {}
    for key in sorted(weights.infos, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, getattr(model, "base_model_prefix", None), here)
        if pattern is not None:
            if name in here and _stacks(by_pattern[pattern]):
                pieces.setdefault(name, {}).setdefault(pattern, []).append(key)
        elif name != key and name in here:
            renamed[name] = key
    stacks = {}
    for name, found in pieces.items():
        patterns = next(iter(by_pattern[pattern] for pattern in found)).source_patterns
        parts = tuple(tuple(found.get(pattern, ())) for pattern in patterns)
        shape = tuple(here[name].shape)
        shapes = [{weights.infos[key].shape for key in part} for part in parts]
        rows = sum(next(iter(one))[0] for one in shapes if len(one) == 1 and len(next(iter(one))) == 2)
        fits = all(len(part) == shape[0] and len(one) == 1 for part, one in zip(parts, shapes, strict=True))
        if fits and len(shape) == 3 and (rows, *{next(iter(one))[1] for one in shapes}) == shape[1:]:
            stacks[name] = Stack(parts, (shape[0], shape[1], shape[2]))
    return renamed, stacks


def _stacks(converter: WeightConverter) -> bool:
    """Whether this stacks matrices by expert, and then puts the rows of several such stacks one below the other."""
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``experts.10`` behind ``experts.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


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
