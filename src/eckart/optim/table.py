"""Every optimizer by name. A new one is one file and one line here."""

from __future__ import annotations

from eckart.records import Technique

_ALL: tuple[Technique, ...] = ()

OPTIMIZERS: dict[str, Technique] = {method.name: method for method in _ALL}
"""In the order in which they are shown."""
