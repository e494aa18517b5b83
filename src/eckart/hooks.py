"""Teaches transformers to load Eckart's folders, at the moment when transformers itself is loaded.

Registering needs torch and transformers, seconds of work that ``import eckart`` must not do. So a finder on
``sys.meta_path`` waits for ``transformers.modeling_utils``, which every ``from_pretrained`` of a model
imports, and registers right after it. (Waiting for ``transformers.quantizers.auto`` fails: it is imported
half-way through a circle.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = "transformers.modeling_utils"
REGISTRY = "eckart.hf.registry"


def _register() -> None:
    importlib.import_module(REGISTRY).register()


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
        _register()


class TransformersWatch(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader of the awaited module once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AWAITED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _RegisterAfter(spec.loader)
        return spec


def install() -> None:
    """Register now where transformers is loaded already, else as soon as it is. Again does nothing."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, TransformersWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, TransformersWatch())
