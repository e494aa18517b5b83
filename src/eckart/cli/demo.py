"""``eckart demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal


def demo(
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")] = "eckart-demo",
    keep: Annotated[
        float,
        typer.Option("--keep", metavar="SHARE", help="Share kept of the parameters of the encoder maps."),
    ] = 0.6,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR where it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a small pretrained model from start to report, in minutes, without a download.

    JSON: folder, report, outcome, evaluation, seconds.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    found = [] if 0 < keep <= 1 else [f"--keep is a share in (0, 1]; got {keep:g}. For 60 % write 0.6."]
    checks.refuse(found + checks.output_problems(output, overwrite, folder=True))
    path = Path(output)
    with terminal.working(path) as progress:
        result = eckart.demo(path, keep=keep, overwrite=overwrite, progress=progress)
    payload = {name: getattr(result, name) for name in ("folder", "report", "outcome", "evaluation", "seconds")}
    places = {"folder": result.folder, "report": result.report}
    terminal.result(
        payload,
        lambda console: render.demo(console, result.outcome, result.evaluation, places, result.seconds),
    )
