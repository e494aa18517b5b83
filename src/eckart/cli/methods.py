"""``eckart methods``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import eckart
from eckart.cli import render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal

MethodKind = Literal["factors", "modules", "repair", "adapters", "training", "optimizers", "pruning", "diagnostics"]


def methods(as_json: Json = False, quiet: Quiet = False) -> None:
    """List all methods: factors and modules (compress), repair (compensate), adapters (adapt), and those in Python.

    JSON: methods, a list of kind, name, summary, paper, entry (what it is called in Python), needs, loss_units,
    options (name, type, default), claim.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    kinds: tuple[MethodKind, ...] = get_args(MethodKind)
    rows = [_row(kind, method) for kind in kinds for method in eckart.methods(kind)]
    terminal.result({"methods": rows}, lambda console: render.methods(console, rows))


def _row(kind: str, method: Any) -> dict[str, Any]:
    options = getattr(method, "options", None)
    return {
        "kind": kind,
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "entry": _entry(method),
        "needs": getattr(method, "needs", frozenset()),
        "loss_units": getattr(method, "loss_units", False),
        "options": [] if options is None else [_option(field) for field in dataclasses.fields(options)],
        "claim": {"statement": method.claim.statement, "source": method.claim.source},
    }


def _entry(method: Any) -> str:
    """What a diagnostic or a method of training is called in Python; empty for the others."""
    entry = getattr(method, "entry", None)
    return "" if entry is None else f"{entry.__module__.rpartition('.')[0]}.{entry.__name__}"


def _option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    default = None if field.default is dataclasses.MISSING else field.default
    return {"name": field.name, "type": kind, "default": default}
