"""``eckart.methods``: the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from eckart.adaptation import ADAPTATIONS
from eckart.compensation import COMPENSATIONS
from eckart.compression import METHODS
from eckart.errors import InputError, unknown
from eckart.geometry import GEOMETRY
from eckart.landscape import LANDSCAPE
from eckart.modules import MODULES
from eckart.optim import OPTIMIZERS
from eckart.prune import PRUNING
from eckart.records import Claim, Paper
from eckart.spectra import SPECTRA
from eckart.training import TRAINING

MethodKind = Literal["factors", "modules", "repair", "adapters", "training", "optimizers", "pruning", "diagnostics"]


class Method(Protocol):
    """What the methods of every table have."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def paper(self) -> Paper: ...
    @property
    def claim(self) -> Claim: ...


TABLES: Mapping[MethodKind, Mapping[str, Method]] = {
    "factors": METHODS,
    "modules": MODULES,
    "repair": COMPENSATIONS,
    "adapters": ADAPTATIONS,
    "training": TRAINING,
    "optimizers": OPTIMIZERS,
    "pruning": PRUNING,
    "diagnostics": {**SPECTRA, **LANDSCAPE, **GEOMETRY},
}
"""``factors`` and ``modules`` for ``compress --method``, ``repair`` for ``compensate --method``, ``adapters`` for
``adapt --method``, ``training``, ``optimizers`` and ``pruning`` for classes and functions of
:mod:`eckart.training`, :mod:`eckart.optim` and :mod:`eckart.prune`, ``diagnostics`` for functions of
:mod:`eckart.spectra`, :mod:`eckart.landscape` and :mod:`eckart.geometry`."""


def methods(kind: MethodKind | None = None) -> tuple[Method, ...]:
    """The methods of one table, or of all, in the order of the tables. Raises InputError for another kind."""
    if kind is not None and kind not in TABLES:
        raise InputError(unknown("kind of method", str(kind), TABLES))
    return tuple(method for name, table in TABLES.items() if kind in (None, name) for method in table.values())
