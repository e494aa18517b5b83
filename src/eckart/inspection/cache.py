"""What was measured of a weight, kept by the hash of its numbers, so that a look at a model can be taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.checkpoint.atomic import write_text
from eckart.errors import FileError
from eckart.inspection.measure import Measured
from eckart.inspection.record import Tier
from eckart.inspection.source import Entry
from eckart.records import Finding, as_plain

_FORMAT = 1
"""Raised when what is measured, or how, changes: older files are then not read."""
_PIECE = 1 << 24
"""Numbers hashed at a time where they have to be copied."""


def digest(W: Tensor) -> str:
    """SHA-256 of the numbers of a tensor with its dtype and shape, in hex; a view of a file is not copied."""
    found = hashlib.sha256(f"{W.dtype} {tuple(W.shape)}".encode())
    W = W.detach()
    if W.is_contiguous():
        for piece in torch.split(W.reshape(-1), _PIECE):
            found.update(_raw(piece))
    else:
        for row in W:
            found.update(_raw(row.contiguous().reshape(-1)))
    return found.hexdigest()


def _raw(flat: Tensor) -> memoryview:
    return flat.cpu().view(torch.uint8).numpy().data


class Cache:
    """A folder with one JSON file per weight and tier; without a folder nothing is kept.

    A file is whole or not there, so a run that was killed is taken up where it stopped. Files that are damaged or of
    another version are measured again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found = 0
        """How many weights were not measured again."""
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FileError(f"{folder} cannot be a cache: {error}.") from error

    def get(self, key: str, measure: Callable[[], Measured]) -> Measured:
        """What is kept under ``key``, or else what ``measure`` gives, which then is."""
        if self.folder is None:
            return measure()
        path = self.folder / f"{key}.json"
        if (known := _read(path)) is not None:
            self.found += 1
            return known
        measured = measure()
        write_text(path, json.dumps(as_plain(measured), allow_nan=False))
        return measured


def key_of(entry: Entry, tier: Tier, own: str, base: str) -> str:
    """The name under which what is measured of these numbers is kept."""
    parts = (_FORMAT, own, base, tier, entry.kind, entry.groups)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: Path) -> Measured | None:
    try:
        return _measured(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _measured(value: Mapping[str, Any]) -> Measured:
    findings = {
        name: Finding(**{**finding, "notes": tuple(finding["notes"])}) for name, finding in value["findings"].items()
    }
    curves = {name: tuple(value[name]) for name in ("singular_values", "places", "noise", "energy")}
    return Measured(
        findings=findings,
        verdict=str(value["verdict"]),
        equal=bool(value["equal"]),
        seconds=float(value["seconds"]),
        **curves,
    )
