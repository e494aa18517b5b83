"""Eckart finds low-dimensional structure in neural networks and uses it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eckart import hooks as _hooks
from eckart.errors import (
    BudgetError,
    EckartError,
    EckartWarning,
    FileError,
    InputError,
    MismatchError,
    NotFiniteError,
)
from eckart.records import Budget, Claim, Evaluation, Finding, Outcome, Paper, Rank, Site, Size

if TYPE_CHECKING:
    from eckart import optim, prune
    from eckart.hf.adapters.config import AdapterConfig
    from eckart.moments import Moments
    from eckart.planning import Plan
    from eckart.verbs.adapt import adapt, adapt_plan
    from eckart.verbs.calibrate import calibrate
    from eckart.verbs.claims import claims
    from eckart.verbs.compensate import compensate
    from eckart.verbs.compress import compress
    from eckart.verbs.convert import convert
    from eckart.verbs.demo import demo
    from eckart.verbs.dimension import dimension
    from eckart.verbs.doctor import doctor
    from eckart.verbs.evaluate import evaluate
    from eckart.verbs.export import export
    from eckart.verbs.inspect import inspect
    from eckart.verbs.load import load
    from eckart.verbs.methods import methods
    from eckart.verbs.plan import plan
    from eckart.verbs.preview import preview
    from eckart.verbs.prune import prune_model
    from eckart.verbs.save import save
    from eckart.verbs.stream import compress_stream

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "Budget",
    "BudgetError",
    "Claim",
    "EckartError",
    "EckartWarning",
    "Evaluation",
    "FileError",
    "Finding",
    "InputError",
    "MismatchError",
    "Moments",
    "NotFiniteError",
    "Outcome",
    "Paper",
    "Plan",
    "Rank",
    "Site",
    "Size",
    "adapt",
    "adapt_plan",
    "calibrate",
    "claims",
    "compensate",
    "compress",
    "compress_stream",
    "convert",
    "demo",
    "dimension",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "load",
    "methods",
    "optim",
    "plan",
    "preview",
    "prune",
    "prune_model",
    "save",
]

# Names whose modules import torch: fetched when first used, so that `import eckart` costs milliseconds.
_VERBS = (
    "adapt calibrate claims compensate compress convert demo dimension doctor evaluate export inspect load methods "
    "plan preview save"
)
_LAZY = {verb: f"eckart.verbs.{verb}" for verb in _VERBS.split()} | {
    "AdapterConfig": "eckart.hf.adapters.config",
    "Moments": "eckart.moments",
    "adapt_plan": "eckart.verbs.adapt",
    "compress_stream": "eckart.verbs.stream",
    "prune_model": "eckart.verbs.prune",
    "Plan": "eckart.planning",
}


_ROOMS = ("optim", "prune")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"eckart.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_hooks.install()
