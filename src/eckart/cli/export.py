"""``eckart export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import eckart
from eckart.cli import checks, render
from eckart.cli.flags import Json, Quiet
from eckart.cli.terminal import Terminal
from eckart.errors import unknown

TARGETS = ("dense", "remote-code", "native", "onnx")
QUANTISED = ("int8",)


def export(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder that `eckart compress` wrote; for onnx any model's.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(TARGETS),
            help="dense: ordinary weights for any software, saves nothing. "
            "remote-code: the factors with the code that loads them without Eckart. "
            "native: a plain checkpoint with a smaller config, where every layer is plain and evenly narrower. "
            "onnx: a graph for onnxruntime, checked against torch.",
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR2", help="Folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR2 where it exists.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", metavar="N", help="onnx: 18 or later; torch chooses.")] = None,
    quantise: Annotated[
        str | None,
        typer.Option("--quantise", metavar="|".join(QUANTISED), help="onnx: 8-bit weights, a scale per channel."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="onnx: largest relative difference from torch; 1e-4, or 0.5 with int8. Above it nothing is written.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a compressed folder in a form that loads without Eckart.

    JSON: folder, to, bytes; for onnx also what its `onnx.json` says: inputs, outputs, differences from torch.
    """
    terminal = Terminal(json=as_json, quiet=quiet)
    found = [] if to in TARGETS else [f"--to: {unknown('form of export', to, TARGETS)}"]
    found += [] if Path(directory).is_dir() else [f"DIR: there is no folder {directory}."]
    given: dict[str, Any] = {"opset": opset, "quantise": quantise, "tolerance": tolerance}
    options = {name: value for name, value in given.items() if value is not None}
    if options and to != "onnx":
        found.append(f"{', '.join(f'--{name}' for name in options)}: only for --to onnx; leave it out.")
    if quantise not in (None, *QUANTISED):
        found.append(f"--quantise: {unknown('quantisation', str(quantise), QUANTISED)}")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        found.append(f"--tolerance: a relative difference above 0, such as 1e-4; got {tolerance}.")
    checks.refuse(found + checks.output_problems(output, overwrite, folder=True, sources=[directory]))
    path = Path(output)
    with terminal.working(path):
        eckart.export(directory, to, path, overwrite=overwrite, **options)
    if to == "dense":
        terminal.note("Dense weights keep the quality of the compressed model and save nothing in size or time.")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    note = json.loads((path / "onnx.json").read_text(encoding="utf-8")) if to == "onnx" else {}
    payload = {**note, "folder": path, "to": to, "bytes": size}
    terminal.result(payload, lambda console: render.exported(console, path, size, note))
