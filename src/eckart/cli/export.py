"""``eckart export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal
from eckart.errors import unknown

TARGETS = ("dense", "remote-code")


def export(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Folder that `eckart compress` wrote.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(TARGETS),
            help="dense: ordinary weights for any software, saves nothing. "
            "remote-code: the factors with the code that loads them without Eckart.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR2", help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR2 where it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a compressed folder in a form that loads without Eckart.

    JSON: folder, to, bytes.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    found = [] if to in TARGETS else [f"--to: {unknown('form of export', to, TARGETS)}"]
    found += [] if Path(directory).is_dir() else [f"DIR: there is no folder {directory}."]
    checks.refuse(found + checks.output_problems(output, overwrite, folder=True, sources=[directory]))
    path = Path(output)
    with terminal.working(path):
        eckart.export(directory, to, path, overwrite=overwrite)
    if to == "dense":
        terminal.note("Dense weights keep the quality of the compressed model and save nothing in size or time.")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    payload = {"folder": path, "to": to, "bytes": size}
    terminal.result(payload, lambda console: render.exported(console, path, size))
