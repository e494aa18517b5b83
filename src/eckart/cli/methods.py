"""``eckart methods``."""

from __future__ import annotations

import dataclasses
from typing import Any

import eckart
from eckart.cli import render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal


def methods(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the compression methods, what each needs, and its options.

    JSON: methods, a list of name, summary, paper, needs, loss_units, options (name, type, default), claim.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    rows = [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "needs": method.needs,
            "loss_units": method.loss_units,
            "options": [_option(field) for field in dataclasses.fields(method.options)],
            "claim": {"statement": method.claim.statement, "source": method.claim.source},
        }
        for method in eckart.methods()
    ]
    terminal.result({"methods": rows}, lambda console: render.methods(console, rows))


def _option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    kind = field.type if isinstance(field.type, str) else field.type.__name__
    default = None if field.default is dataclasses.MISSING else field.default
    return {"name": field.name, "type": kind, "default": default}
