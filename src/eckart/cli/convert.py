"""``eckart convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal
from eckart.errors import unknown
from eckart.records import as_plain

TARGETS = ("lora", "merged")


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter that Eckart wrote.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(TARGETS),
            help="lora: plain LoRA of one rank with alpha = r, for PEFT without Eckart and for vLLM. "
            "merged: the whole model with the adapter in its weights.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Base model, if not the one that ADAPTER names.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            metavar="SHARE",
            help="Largest error of the outputs, as a share of what the adapter changes in them. Above it nothing is "
            "written. Default: 0.05.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="R", help="lora: this rank, where the method has no exact one; else the least up to 64."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Texts that the error is measured on; else random tokens."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR where it exists.")] = False,
    device: Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="Device that computes.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter as plain LoRA, exactly or with a measured error, or merged into its base.

    JSON: folder, to, exact, rank, error, weight_errors (by layer), tried (error by rank), measured_on, bytes.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    found = [] if to in TARGETS else [f"--to: {unknown('form of an adapter', to, TARGETS)}"]
    found += [] if Path(adapter).is_dir() else [f"ADAPTER: there is no folder {adapter}."]
    if max_error is not None and not 0 < max_error < float("inf"):
        found.append(f"--max-error: a share above 0, such as 0.05; got {max_error}.")
    if rank is not None and rank < 1:
        found.append(f"--rank: a number of at least 1; got {rank}.")
    if rank is not None and to == "merged":
        found.append("--rank: only for --to lora; leave it out.")
    checks.refuse(found + checks.output_problems(output, overwrite, folder=True, sources=[adapter, base]))
    given: dict[str, Any] = {"base": base, "max_error": max_error, "rank": rank, "data": data, "device": device}
    options = {name: value for name, value in given.items() if value is not None}
    path = Path(output)
    with terminal.working(path) as progress:
        form: Any = to  # one of TARGETS
        result = eckart.convert(adapter, form, path, **options, overwrite=overwrite, progress=progress)
    content = as_plain(result)
    terminal.result(content, lambda console: _draw(console, content, path))


def _draw(console: Console, content: dict[str, Any], path: Path) -> None:
    """How near it is, and where it lies."""
    shown = {name: content[name] for name in ("to", "exact", "rank", "error", "measured_on", "bytes")}
    render.tree(console, {name: value for name, value in shown.items() if value is not None})
    if content["tried"]:
        render.tree(console, {"error by rank": content["tried"]})
    render.saved(console, path)
