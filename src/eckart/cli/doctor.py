"""``eckart doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

import eckart
from eckart.cli import render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal


def doctor(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Folder to look at.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is in DIR, where it loads, and whether it is whole. Exits with 1 where it is not.

    JSON: path, kind, whole, loads, architecture, weight_files, problems and more.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    with terminal.working():
        state = eckart.doctor(directory)
    terminal.result(state.to_json(), lambda console: render.folder(console, state.to_json()))
    if not state.whole:
        raise typer.Exit(1)
