"""``eckart dimension``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import eckart
from eckart.checkpoint.atomic import write_text
from eckart.cli import checks, render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal


def dimension(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A .npy or .safetensors file with one point a row.", show_default=False),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Page to write.", rich_help_panel="Output"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the page where it exists.", rich_help_panel="Output")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="TENSOR", help="Which tensor of a .safetensors file.")
    ] = None,
    neighbours: Annotated[
        int, typer.Option("--neighbours", metavar="K", help="Neighbours that the estimators look at.")
    ] = 20,
    at_most: Annotated[
        int, typer.Option("--at-most", metavar="N", help="Of more rows that many are drawn; 0 takes all.")
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the intrinsic dimension of DATA as a curve over scale: how many coordinates a point really has.

    JSON: dimension (n, features, duplicates, curves, verdict, notes), page (where one was written).
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    found = checks.file_problems("DATA", data)
    if Path(data).suffix not in (".npy", ".safetensors"):
        found.append(f"DATA: expected a .npy or .safetensors file; got {data}.")
    if neighbours < 2:
        found.append(f"--neighbours: at least 2; got {neighbours}.")
    if at_most and at_most < 3:
        found.append(f"--at-most: at least 3, or 0 for all rows; got {at_most}.")
    if output is not None:
        found += checks.output_problems(output, overwrite, folder=False, sources=[data])
    checks.refuse(found)
    page = None if output is None else Path(output)
    with terminal.working(page):
        curve = eckart.dimension(data, name=name, neighbours=neighbours, at_most=at_most or None, seed=seed)
        if page is not None:
            write_text(page, curve.page(shlex.join(["eckart", *sys.argv[1:]])))
    terminal.result(
        {"dimension": curve.to_json(), "page": page}, lambda console: render.dimension(console, curve, page)
    )
