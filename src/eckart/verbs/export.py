"""``eckart.export``: a compressed folder in a form that loads without Eckart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from eckart.errors import InputError, unknown
from eckart.hf.native import export_native
from eckart.hf.onnx import Quantise, export_onnx
from eckart.hf.remote_code import export_dense, export_remote_code

TARGETS = {
    "dense": export_dense,
    "remote-code": export_remote_code,
    "native": export_native,
    "onnx": export_onnx,
}


def export(
    directory: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    opset: int | None = None,
    quantise: Quantise | None = None,
    tolerance: float | None = None,
) -> Path:
    """Write ``directory`` again in a form that other programs load, as a whole folder or not at all.

    ``dense``: ordinary weights; keeps the quality, saves nothing. ``remote-code``: factors with the code that loads
    them under ``trust_remote_code=True``. ``native``: a plain checkpoint with a smaller config, for models whose
    layers are plain and evenly narrower (``eckart.hf.native.export_native``). ``onnx``: a graph for onnxruntime,
    also of a model that was not compressed, checked against torch (``eckart.hf.onnx.export_onnx``, which says
    what ``opset``, ``quantise`` and ``tolerance`` mean; they are for ``onnx`` alone).

    Raises InputError for another target, options of another target and models that have no such form, FileError for
    folders that cannot be read or written, EckartError where the result does not compute what the model does.
    """
    if to not in TARGETS:
        raise InputError(unknown("form of export", to, TARGETS))
    given: dict[str, Any] = {"opset": opset, "quantise": quantise, "tolerance": tolerance}
    options = {name: value for name, value in given.items() if value is not None}
    if options and to != "onnx":
        raise InputError(f"{', '.join(options)}: of no effect on an export to {to}, only to onnx. Leave it out.")
    path = Path(output)
    TARGETS[to](Path(directory), path, overwrite=overwrite, **options)
    return path
