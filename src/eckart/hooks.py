"""Teaches transformers to load Eckart's folders and PEFT to adapt its layers, at the moment when they are loaded.

Registering needs torch and transformers, seconds of work that ``import eckart`` must not do. So a finder on
``sys.meta_path`` waits for ``transformers.modeling_utils``, which every ``from_pretrained`` of a model
imports, and registers right after it. (Waiting for ``transformers.quantizers.auto`` fails: it is imported
half-way through a circle.) For PEFT it waits for the module that chooses the LoRA of a layer, and for the whole package
to register the adapters of :mod:`eckart.hf.adapters`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = {
    "transformers.modeling_utils": "eckart.hf.registry",
    "peft.tuners.lora.model": "eckart.hf.lora_layers",
    "peft": "eckart.hf.adapters.tuner",
}
"""The module that is waited for → the one whose ``register()`` is called then."""


def _register(awaited: str) -> None:
    register = getattr(importlib.import_module(AWAITED[awaited]), "register", None)
    if register is not None:  # missing only where that module is being imported and will do it at its end
        register()


class _RegisterAfter(importlib.abc.Loader):
    """The real loader of the awaited module, followed by the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module.__name__)


class Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loaders of the awaited modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in AWAITED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _RegisterAfter(spec.loader)
        return spec


def install() -> None:
    """Register now with what is loaded already, with the rest as soon as it is. Again does nothing."""
    for awaited in AWAITED:
        if awaited in sys.modules:
            _register(awaited)
    if not any(isinstance(finder, Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watch())
