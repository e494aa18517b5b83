"""Optimizers of this room in the Trainer of transformers, which this file need not import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from eckart.errors import InputError, problems, unknown
from eckart.optim.routing import param_groups
from eckart.optim.table import OPTIMIZERS


def for_trainer(
    name: str,
    *,
    model: nn.Module | None = None,
    groups: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What ``transformers.Trainer(…, optimizer_cls_and_kwargs=…)`` takes: the class and its keyword arguments.

    ::

        chosen = for_trainer("galore", model=model, lr=1e-3, rank=128)
        trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=chosen)

    ``name`` is one of :data:`eckart.optim.OPTIMIZERS` that is an optimizer; ``options`` are its own keyword arguments.
    With ``model``, its parameters are routed by :func:`param_groups`, with ``groups`` as keyword arguments
    (``{"overrides": …}``) and ``weight_decay`` of the options for the matrices alone. Without it the Trainer makes two
    groups, with ``args.weight_decay`` and with none for biases and norms, and shapes decide: every matrix, embeddings
    and heads too, gets the rule of matrices.

    The learning rate is ``lr`` of the options, or the default of the class: with ``optimizer_cls_and_kwargs`` the
    Trainer uses neither ``args.learning_rate`` nor ``args.adam_beta1`` and the like. Its schedule multiplies the lr of
    each group, whatever it is, by the same factor.

    With ``model``, which has to be the one that is trained, the result serves one Trainer, as that takes ``params`` out
    of the keyword arguments. Parameters are looked up when the optimizer is made, so that those that FSDP2 put in their
    place are found; FSDP1 and DeepSpeed flatten them, and no routing survives that. Raises InputError for an unknown
    name, a method that is no optimizer, groups without model, and what :func:`param_groups` raises.
    """
    faults = []
    if name not in OPTIMIZERS:
        faults.append(unknown("optimizer", name, _classes()))
    elif name not in _classes():
        faults.append(f"{name!r} is no optimizer but {OPTIMIZERS[name].summary}. Optimizers: {', '.join(_classes())}.")
    if groups is not None and model is None:
        faults.append("groups say how model is routed; give model too.")
    if taken := sorted({"params", "model", "optimizer_dict"} & set(options)):
        faults.append(f"{', '.join(taken)} would be taken by the Trainer; use model and groups.")
    if faults:
        raise InputError(problems("for_trainer", faults))
    kwargs = dict(options)
    if model is not None:
        decay = {"weight_decay": options["weight_decay"]} if "weight_decay" in options else {}
        kwargs["params"] = _Routed(model, {**decay, **(groups or {})})
    return _classes()[name], kwargs


class _Routed:
    """The groups of a model as they are when they are asked for."""

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self.model, self.options = model, options
        param_groups(model, **options)  # faults show now, not when the Trainer begins

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(param_groups(self.model, **self.options))

    def __repr__(self) -> str:
        return repr(param_groups(self.model, **self.options))


def _classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Entries of the table that are optimizers."""
    return {
        name: method.entry
        for name, method in OPTIMIZERS.items()
        if isinstance(method.entry, type) and issubclass(method.entry, torch.optim.Optimizer)
    }
