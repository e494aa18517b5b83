"""``eckart compress --stream``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import eckart
from eckart.cli import render
from eckart.cli.checks import STREAMED
from eckart.cli.recipe import CompressRecipe
from eckart.cli.terminal import Interrupted, Terminal


def stream(recipe: CompressRecipe, terminal: Terminal, asked: Mapping[str, Any]) -> None:
    """Compress from folder to folder; interrupted, the same command goes on where it was."""
    output = recipe.output
    folder = Path(str(output.folder))
    how = {name: value for name, value in asked.items() if name in STREAMED or name == "budget"}
    if output.max_shard_size is not None:
        how["max_shard_size"] = output.max_shard_size
    command = shlex.join(["eckart", *sys.argv[1:]])
    try:
        with terminal.working(folder) as progress:
            made = eckart.compress_stream(
                str(recipe.model), folder, **how, overwrite=bool(output.overwrite), command=command, progress=progress
            )
    except Interrupted as error:
        raise Interrupted(f"{error} What is done is kept beside it: the same command goes on from there.") from None
    if made.resumed:
        terminal.note("went on where an earlier run had stopped")
    payload = {
        "folder": folder,
        "outcome": made.outcome,
        "plan": made.plan.to_json(),
        "resumed": made.resumed,
        "bookkeeping_seconds": made.bookkeeping_seconds,
    }
    terminal.result(payload, lambda console: render.compressed(console, made.outcome, folder))
