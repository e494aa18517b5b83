"""Where weights come from: a file, a folder, a module, a mapping. Tensors are handed out one by one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eckart.arch.kinds import weights_of
from eckart.checkpoint.folder import inspect_folder
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.checkpoint.weights import DTYPES, Weights, open_weights
from eckart.errors import FileError, InputError, problems
from eckart.inspection.names import INPUT_FIRST_MODELS, kind_of, places
from eckart.records import SiteKind
from eckart.spectra import unmeasurable

WeightsLike = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]
"""What :func:`eckart.inspection.inspect_weights` reads."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor, before its numbers are read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    kind: SiteKind
    groups: int = 1
    reason: str = ""
    """Why it cannot be measured; empty where it can."""
    shared: bool = False
    """Whether it is a tensor that came before under another name, so that it takes nothing."""

    @property
    def parameters(self) -> int:
        return 0 if self.shared else torch.Size(self.shape).numel()

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(slices, out, in) as :func:`eckart.linalg.matricize` gives them; zeros where there is a ``reason``."""
        if self.reason:
            return 0, 0, 0
        first, rest = self.shape[0], torch.Size(self.shape[1:]).numel()
        if self.kind == "conv":
            return self.groups, first // self.groups, rest
        if self.kind == "experts":
            return self.shape[0], self.shape[1], self.shape[2]
        return (1, rest, first) if self.kind in ("conv1d", "embedding") else (1, first, rest)


@dataclass(frozen=True)
class Source:
    """Tensors by name, in the order of the model."""

    label: str
    """What people call it: the path, or the class of the module."""
    entries: tuple[Entry, ...]
    read: Callable[[str], Tensor]
    """The numbers of an entry: of files a view that takes no memory of its own."""
    notes: tuple[str, ...] = ()


def open_source(source: WeightsLike) -> Source:
    """Open what weights are read from; nothing but headers is read yet.

    A ``.safetensors`` file; a model folder (one file, or several with an index, checked against it); any other folder
    with ``.safetensors`` files in it; a module, with its buffers; a mapping of tensors. Raises FileError for what is
    missing, cut short or pickled, InputError for anything else.
    """
    if isinstance(source, nn.Module):
        return _of_module(source)
    if isinstance(source, Mapping):
        return _of_mapping(source)
    if isinstance(source, (str, os.PathLike)):
        return _of_path(Path(source))
    raise InputError(
        f"expected a .safetensors file, a folder, an nn.Module or a mapping of tensors; got {type(source).__name__}."
    )


def _of_path(path: Path) -> Source:
    if not path.exists():
        raise FileError(f"{path} does not exist.")
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise FileError(f"{path} is pickled, which can run code when read; convert it to safetensors.")
        header = read_header(path)
        return _of_weights(str(path), Weights(path.parent, header, dict.fromkeys(header, path.name)), "", ())
    if (path / "config.json").is_file():
        state = inspect_folder(path)
        return _of_weights(str(path), open_weights(path), _model_type(path), state.notes)
    return _of_loose_files(path)


def _of_loose_files(path: Path) -> Source:
    """A folder without a config, as of an adapter: every safetensors file in it."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileError(f"{path} holds neither a config.json nor a .safetensors file, so there is nothing to measure.")
    where: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    twice = []
    for file in files:
        header = read_header(file)
        twice += [f"{name} is in both {where[name]} and {file.name}" for name in header if name in where]
        where.update(dict.fromkeys(header, file.name))
        infos.update(header)
    if twice:
        raise FileError(problems(f"{path} holds files that do not belong together; name one of them", twice[:5]))
    return _of_weights(str(path), Weights(path, infos, where), "", ())


def _model_type(path: Path) -> str:
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except ValueError:
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def _of_weights(label: str, weights: Weights, model_type: str, notes: tuple[str, ...]) -> Source:
    entries = []
    for name, info in weights.infos.items():
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            reason = f"{info.dtype}: quantised or of a format not read here; dequantise it to measure it"
        else:
            reason = unmeasurable(_hollow(info, dtype))
        shown = info.dtype.lower() if dtype is None else str(dtype).removeprefix("torch.")
        kind = kind_of(name, info.shape, model_type in INPUT_FIRST_MODELS)
        entries.append(Entry(name=name, shape=info.shape, dtype=shown, bytes=info.bytes, kind=kind, reason=reason))
    return Source(label, tuple(_in_order(entries)), weights.__getitem__, notes)


def _in_order(entries: list[Entry]) -> list[Entry]:
    """As a model has them, which files do not tell: what comes before the blocks, the blocks by number, the rest."""
    found = places(entry.name for entry in entries)

    def order(entry: Entry) -> tuple[object, ...]:
        depth = found[entry.name].depth
        part = 1 if depth is not None else 0 if "embed" in entry.name or entry.kind == "embedding" else 2
        numbered = [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in entry.name.split(".")]
        return part, numbered

    return sorted(entries, key=order)


def _hollow(info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """A tensor of this dtype and shape that takes no memory."""
    return torch.empty((), dtype=dtype).expand(info.shape)


def _of_module(model: nn.Module) -> Source:
    kinds: dict[str, tuple[SiteKind, int]] = {}
    for path, module in model.named_modules():
        for weight in weights_of(module):
            kinds[f"{path}.{weight.parameter}" if path else weight.parameter] = (weight.kind, weight.groups)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return _of_tensors(type(model).__name__, tensors, kinds)


def _of_mapping(tensors: Mapping[str, Tensor]) -> Source:
    wrong = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong:
        raise InputError(f"expected a mapping of names to tensors; {', '.join(wrong[:5])} are none.")
    return _of_tensors("tensors", {str(name): tensor for name, tensor in tensors.items()}, {})


def _of_tensors(label: str, tensors: Mapping[str, Tensor], kinds: Mapping[str, tuple[SiteKind, int]]) -> Source:
    first: dict[int, str] = {}
    entries = []
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            why = "it has no shape yet; call the model once"
            entries.append(Entry(name=name, shape=(), dtype="unknown", bytes=0, kind="linear", reason=why, shared=True))
            continue
        owner = first.setdefault(id(tensor), name)
        reason = unmeasurable(tensor) if owner == name else f"the same tensor as {owner}"
        kind, groups = kinds.get(name, (kind_of(name, tuple(tensor.shape)), 1))
        entries.append(
            Entry(
                name=name,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                bytes=tensor.numel() * tensor.dtype.itemsize if owner == name else 0,
                kind=kind,
                groups=groups,
                reason=reason,
                shared=owner != name,
            )
        )
    return Source(label, tuple(entries), tensors.__getitem__)
