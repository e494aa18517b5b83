"""Masks as a side object: which weights of a model are zero, kept so while any optimizer trains on.

A mask is no part of the model. Parameters keep their names, and copying, pickling, saving and loading the model work
as ever; the masks have a file of their own. What keeps the zeros is a hook after every optimizer step. Masking the
gradients would not: optimizers that mix the entries of a matrix, such as Muon, move weights whose gradient is zero.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from eckart.arch import fingerprint
from eckart.checkpoint.weights import read_metadata, read_tensors, write_tensors
from eckart.errors import FileError, InputError, MismatchError, NotFiniteError, problems

_KEY, _VERSION = "eckart-masks", 1


class MaskSet(Mapping[str, Tensor]):
    """Bool tensors by parameter name, true where a weight stays, in the order of the model.

    Names are those of ``model.named_parameters()``; a weight that modules share has one mask, under any of its names.
    A mask has the shape of its parameter as it is stored. What no mask names is dense and left alone.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        """Copies nothing. Raises InputError that names everything that is no bool tensor."""
        wrong = [
            f"{name}: expected a bool tensor; got {f'dtype {m.dtype}' if isinstance(m, Tensor) else type(m).__name__}"
            for name, m in masks.items()
            if not isinstance(m, Tensor) or m.dtype != torch.bool
        ]
        if wrong:
            raise InputError(problems("masks", wrong))
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} weights, {self.density():.4g} of {self.numel():,} numbers kept)"

    @classmethod
    def from_model(cls, model: nn.Module, names: Sequence[str] | None = None) -> MaskSet:
        """The masks of the zeros that a model has.

        ``names``: parameters to read. By default those of two dimensions or more that hold a zero; a bias of zeros is
        where training starts, not where pruning ended. Raises InputError for names that the model lacks.
        """
        parameters = dict(model.named_parameters(remove_duplicate=names is None))
        if names is None:
            names = [n for n, p in parameters.items() if p.ndim > 1 and bool((p == 0).any())]
        if missing := [name for name in names if name not in parameters]:
            raise InputError(problems("the model has no such parameters", missing))
        return cls({name: parameters[name].detach() != 0 for name in names})

    def numel(self) -> int:
        """Numbers under all masks, kept or not."""
        return sum(mask.numel() for mask in self.values())

    def kept(self) -> int:
        """How many of them stay."""
        return sum(int(mask.sum()) for mask in self.values())

    def density(self) -> float:
        """kept / numel, in [0, 1]; 1 without masks. Weights without a mask do not count."""
        return self.kept() / self.numel() if len(self) else 1.0

    def densities(self) -> dict[str, float]:
        """The share that stays, by parameter."""
        return {name: int(mask.sum()) / max(mask.numel(), 1) for name, mask in self.items()}

    def same(self, other: Mapping[str, Tensor]) -> bool:
        """Whether both keep the same weights under the same names."""
        return set(self) == set(other) and all(
            torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items()
        )

    def check(self, model: nn.Module) -> None:
        """Raises MismatchError with every mask whose name or shape the model lacks, or whose weight has two masks."""
        self._parameters(model)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        every = dict(model.named_parameters(remove_duplicate=False))
        wrong, first = [], dict[int, str]()
        for name, mask in self.items():
            if name not in every:
                wrong.append(f"{name} is no parameter of the model")
            elif every[name].shape != mask.shape:
                wrong.append(
                    f"{name} has shape {tuple(every[name].shape)} in the model, {tuple(mask.shape)} in the masks"
                )
            elif (other := first.setdefault(id(every[name]), name)) != name:
                wrong.append(f"{name} and {other} are one tied weight with two masks; keep one")
        if wrong:
            raise MismatchError(problems("the masks do not belong to this model", wrong))
        return {name: every[name] for name in self}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Sets the weights that do not stay to 0, in place.

        Raises MismatchError as :meth:`check`, before any change.
        """
        for name, parameter in self._parameters(model).items():
            parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def leaks(self, model: nn.Module) -> dict[str, int]:
        """How many weights that should be zero are not (NaN counts), by parameter; empty where all are zero."""
        found = {
            name: int((parameter.detach() != 0)[~self[name].to(parameter.device)].sum())
            for name, parameter in self._parameters(model).items()
        }
        return {name: n for name, n in found.items() if n}

    # ---- the file

    def save(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """One safetensors file, an eighth of a byte per weight; whole or not at all.

        With ``model``, the masks are checked against it and its fingerprint is written, so that :meth:`load` can
        tell it from other models of the same shapes. Raises MismatchError, and FileError where it cannot be written.
        """
        facts: dict[str, Any] = {"version": _VERSION, "shapes": {name: list(mask.shape) for name, mask in self.items()}}
        if model is not None:
            self.check(model)
            facts["fingerprint"] = fingerprint(model)
        write_tensors(Path(path), {name: _packed(mask) for name, mask in self.items()}, {_KEY: json.dumps(facts)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None, *, other_weights: bool = False
    ) -> MaskSet:
        """The masks of a file, on the CPU; with ``model`` checked against it.

        Raises FileError for a file that is damaged or holds no masks; MismatchError for masks of another model: names
        or shapes that it lacks, or, where the file has a fingerprint, other weights. ``other_weights=True``
        allows the last, for masks that are put on a model trained on, or on the dense one.
        """
        source = Path(path)
        tensors, metadata = read_tensors(source), read_metadata(source)
        try:
            facts = json.loads(metadata[_KEY])
            shapes = {str(name): tuple(int(n) for n in shape) for name, shape in facts["shapes"].items()}
            version, seen = facts["version"], facts.get("fingerprint")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{source} holds no masks of Eckart; they are written by MaskSet.save.") from error
        if version != _VERSION:
            raise FileError(f"{source} has masks of version {version}; this Eckart reads version {_VERSION}.")
        bad = set(shapes) ^ set(tensors)
        bad |= {n for n in set(shapes) & set(tensors) if not _fits(tensors[n], shapes[n])}
        if bad:
            raise FileError(problems(f"{source} is damaged: these masks do not fit their shapes", sorted(bad)))
        masks = cls({name: _unpacked(tensors[name], shape) for name, shape in shapes.items()})
        if model is not None:
            masks.check(model)
            if seen is not None and not other_weights and seen != fingerprint(model):
                raise MismatchError(
                    f"{source} was saved with other weights than this model has. Load the model that it was saved "
                    "with, or say other_weights=True."
                )
        return masks


def _packed(mask: Tensor) -> Tensor:
    """(⌈n/8⌉,) uint8, eight weights a byte, the first in the highest bit."""
    flat = mask.detach().cpu().reshape(-1).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).reshape(-1, 8)
    return (flat << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[: math.prod(shape)].reshape(shape).bool()


def _fits(packed: Tensor, shape: tuple[int, ...]) -> bool:
    return packed.dtype == torch.uint8 and packed.shape == (-(-math.prod(shape) // 8),)


# ---- the hook


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside of a wrapper that takes no hooks, such as accelerate's; others as they are.

    Raises InputError for what is none.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"expected a torch.optim.Optimizer; got {type(optimizer).__name__}.")
    return optimizer


class KeepZero:
    """Holds the zeros of masks until :meth:`remove`; a context manager. Made by :func:`keep_zero`."""

    def __init__(self, masks: MaskSet, model: nn.Module, optimizer: Any) -> None:
        parameters = masks._parameters(model)
        wrong = [name for name, p in parameters.items() if not bool(torch.isfinite(p.detach()).all())]
        if wrong:
            raise NotFiniteError(problems("weights with NaN or Inf cannot be pruned", wrong))
        self._gone = [(parameter, ~masks[name].to(parameter.device)) for name, parameter in parameters.items()]
        self._optimizer = plain_optimizer(optimizer)
        self._handle: Any = self._optimizer.register_step_post_hook(lambda *_: self.zero())
        self.zero()

    @torch.no_grad()
    def zero(self) -> None:
        """Zeroes weights and optimizer state under the masks, now. Cost: one pass over each."""
        for parameter, gone in self._gone:
            parameter.masked_fill_(gone.to(parameter.device), 0)
            zero_state(self._optimizer, parameter, gone)

    def remove(self) -> None:
        """Lets the weights go; they are 0 and train again. A second call does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def keep_zero(masks: MaskSet, model: nn.Module, optimizer: Any) -> KeepZero:
    """Keeps the weights under ``masks`` exactly zero through every ``optimizer.step()``, until ``.remove()``.

    Works with any torch optimizer, wrapped by accelerate or not, made before the masks or after them: weights and
    their state are zeroed at once and after each step. State is zeroed where it has the shape of the weight and is
    a float or a signed 8-bit code, as momenta and second moments are; what is smaller, as Adafactor's rows and columns,
    stays as it is, since the weights are zeroed in any case. The optimizer needs not hold every masked weight.

    The hook holds the model's parameters, not their names: after they have been replaced by others, call it again.
    Raises MismatchError for masks of another model, NotFiniteError for NaN or Inf in a masked weight, InputError for
    something that is no optimizer; nothing is changed then.
    """
    return KeepZero(masks, model, optimizer)


def zero_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gone: Tensor) -> None:
    """Zeroes what ``optimizer`` remembers of the weights where ``gone`` is true, where it has their shape."""
    for value in optimizer.state.get(parameter, {}).values():
        if not isinstance(value, Tensor) or value.shape != gone.shape or value.ndim == 0:
            continue
        if value.is_floating_point() or value.dtype == torch.int8:
            value.masked_fill_(gone.to(value.device), 0)
