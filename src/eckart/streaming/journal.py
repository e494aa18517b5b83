"""What a streamed run has done so far: units of work with their files, so that a killed run goes on where it was.

The journal is a file of JSON lines that only grows. Its first line is the identity of the run: command, model, data,
versions. Each further line is a unit that is done, with the length and CRC-32 of its files, or one that was lost
again. A line that was cut short by the end of the process counts as never written. Nothing is synced to disk: after
``kill -9`` the system still has what was written, and what a power cut took is found by its CRC and made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eckart.checkpoint.atomic import work_folder
from eckart.checkpoint.weights import Mark
from eckart.errors import FileError, MismatchError, problems

FILE = "journal.jsonl"


class Lost(Exception):
    """A unit that the journal knows has a file that is gone or damaged; it has to be made again."""

    def __init__(self, unit: str) -> None:
        super().__init__(unit)
        self.unit = unit


@dataclass(frozen=True)
class _Done:
    files: Mapping[str, Mark]
    facts: Mapping[str, Any]


@dataclass
class Journal:
    """The units of one run. Made by :func:`open_journal`."""

    folder: Path
    identity: Mapping[str, Any]
    resumed: bool
    """Whether an earlier process has begun this run."""
    seconds: float = 0.0
    """Spent here: on lines and on checking files."""
    _done: dict[str, _Done] = field(default_factory=dict)
    _sure: set[str] = field(default_factory=set)
    """Units whose content this process wrote or has checked."""

    def has(self, unit: str) -> bool:
        """Whether the unit is done and its files have their length."""
        entry = self._done.get(unit)
        return entry is not None and all(
            mark.fits(self.folder / name, content=False) for name, mark in entry.files.items()
        )

    def facts(self, unit: str) -> Mapping[str, Any]:
        """What was noted beside the unit's files."""
        return self._done[unit].facts

    def require(self, unit: str) -> None:
        """Check the content of a unit's files, once, before they are read. Raises Lost."""
        if unit in self._sure:
            return
        begin = time.perf_counter()
        entry = self._done.get(unit)
        whole = entry is not None and all(
            mark.fits(self.folder / name, content=True) for name, mark in entry.files.items()
        )
        self.seconds += time.perf_counter() - begin
        if not whole:
            raise Lost(unit)
        self._sure.add(unit)

    def done(self, unit: str, files: Mapping[str, Mark], **facts: Any) -> None:
        """Note a unit whose files are written."""
        self._done[unit] = _Done(dict(files), facts)
        self._sure.add(unit)
        marks = {name: [mark.bytes, mark.crc] for name, mark in files.items()}
        self._append({"unit": unit, "files": marks, "facts": facts})

    def forget(self, unit: str) -> None:
        """A unit has to be made again."""
        self._done.pop(unit, None)
        self._sure.discard(unit)
        self._append({"lost": unit})

    def _append(self, line: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        with (self.folder / FILE).open("ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.seconds += time.perf_counter() - begin


def open_journal(target: Path, identity: Mapping[str, Any]) -> Journal:
    """The journal of the run that writes ``target``, begun or taken up again. One process at a time may hold it.

    Raises FileError where the work folder cannot be made, MismatchError where it belongs to a run with another
    ``identity`` (JSON values), with what differs and how to start over.
    """
    folder = work_folder(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} could not be made: {error}.") from error
    return _taken_up(folder, json.loads(json.dumps(identity, allow_nan=False)))


def _taken_up(folder: Path, identity: Mapping[str, Any]) -> Journal:
    lines = list(_lines(folder / FILE))
    journal = Journal(folder, identity, resumed=bool(lines))
    if not lines:
        (folder / FILE).unlink(missing_ok=True)
        journal._append({"identity": identity})
        return journal
    _compare(folder, lines[0].get("identity", {}), identity)
    for line in lines[1:]:
        if "lost" in line:
            journal._done.pop(line["lost"], None)
        else:
            files = {name: Mark(*mark) for name, mark in line["files"].items()}
            journal._done[line["unit"]] = _Done(files, line["facts"])
    return journal


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; what follows a damaged one is cut off, so that new lines begin on their own."""
    if not path.is_file():
        return
    end = 0
    with path.open("rb+") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                break
            end += len(raw)
            yield line
        file.truncate(end)


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise MismatchError(
            problems(f"{folder} holds a run that was begun otherwise", changed)
            + f"\nRun the command as it was to go on, or remove {folder} to start over."
        )
