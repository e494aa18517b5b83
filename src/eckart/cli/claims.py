"""``eckart claims``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import eckart
from eckart.cli import render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal


def claims(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Methods; all of them if none is named.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check what each method's paper claims, in miniature. Exits with 1 where a claim failed.

    JSON: claims, a list of method, statement, source, held, figures, note, seconds.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    rows: list[dict[str, Any]] = []
    with terminal.working():
        for method, verdict, seconds in eckart.claims(tuple(names or ())):
            row = {
                "method": method.name,
                "statement": method.claim.statement,
                "source": method.claim.source,
                "held": verdict.held,
                "figures": verdict.figures,
                "note": verdict.note,
                "seconds": seconds,
            }
            rows.append(row)
            terminal.note(f"{method.name}: {'held' if verdict.held else 'FAILED'} in {seconds:.1f} s")
    terminal.result({"claims": rows}, lambda console: render.claims(console, rows))
    if not all(row["held"] for row in rows):
        raise typer.Exit(1)
