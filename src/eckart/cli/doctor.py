"""``eckart doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

import eckart
from eckart.cli import render
from eckart.cli.flags import Json, Quiet
from eckart.cli.plain import as_plain
from eckart.cli.terminal import Terminal


def doctor(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Folder to look at.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is in DIR, where it loads, and whether it is whole. Exits with 1 where it is not.

    JSON: folder (what was found).
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    with terminal.working():
        state = eckart.doctor(directory)
    terminal.result({"folder": state}, lambda console: render.tree(console, as_plain(state)))
    if not state.whole:
        raise typer.Exit(1)
