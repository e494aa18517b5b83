"""Texts out of .txt and .jsonl files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eckart.errors import FileError, InputError, unknown

SUFFIXES = (".txt", ".jsonl")


def read_lines(path: Path) -> tuple[list[str], str]:
    """The non-blank lines of a text file without their line ends, and its whole content as it is."""
    content = decoded(path)
    lines = [line.removesuffix("\r") for line in content.split("\n")]
    return [line for line in lines if line.strip()], content


def read_records(path: Path, field: str | None) -> list[str]:
    """One field of every object of a JSONL file.

    Without ``field`` it is ``text``, or else the only field that holds text. Raises InputError with the
    line number for lines that are no JSON objects, that lack the field, or whose field holds no text.
    """
    texts: list[str] = []
    for number, record in _records(path):
        if field is None:
            field = _only_text_field(path, record)
        if field not in record:
            raise InputError(f"{path}, line {number}: {unknown('field', field, record)}")
        value = record[field]
        if not isinstance(value, str):
            raise InputError(
                f"{path}, line {number}: expected text in the field {field!r}, got {type(value).__name__}."
            )
        if value.strip():
            texts.append(value)
    return texts


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}).") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}.")
        yield number, record


def _only_text_field(path: Path, record: dict[str, Any]) -> str:
    if "text" in record:
        return "text"
    fields = [name for name, value in record.items() if isinstance(value, str)]
    if len(fields) != 1:
        raise InputError(
            f"{path}: expected a field 'text', or one field only that holds text; there are "
            f"{', '.join(record) or 'none'}. Name one with field=… (--field)."
        )
    return fields[0]


def decoded(path: Path) -> str:
    """The text of a UTF-8 file. Raises FileError and InputError for one that is missing, empty or no text."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileError(f"no data file {path}. Check the path.") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    if not data.strip():
        raise InputError(f"{path} is empty; expected text.")
    if b"\0" in data:
        raise FileError(f"{path} is a binary file (zero bytes in it); expected text in UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} is not text in UTF-8 (byte {data[error.start]:#04x} at {error.start}). "
            "Convert it, for instance with iconv."
        ) from None
