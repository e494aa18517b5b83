"""Every method of narrower modules by name. A new method is one file and one line here."""

from __future__ import annotations

from eckart.errors import InputError, unknown
from eckart.modules import modegpt, obs
from eckart.modules.method import ModuleMethod

MODULES: dict[str, ModuleMethod] = {method.name: method for method in (obs.METHOD, modegpt.METHOD)}
"""In the order in which they are shown."""


def get_module_method(name: str) -> ModuleMethod:
    """The method called ``name``; InputError with the nearest names where there is none."""
    if name not in MODULES:
        raise InputError(unknown("module method", name, MODULES))
    return MODULES[name]
