"""One way to name data."""

from __future__ import annotations

import platform
from pathlib import Path
from random import Random

from eckart.data.files import SUFFIXES, read_lines, read_records
from eckart.data.stdlib import read_docstrings, read_sources
from eckart.data.textdata import TextData, check_part, hash_texts
from eckart.errors import FileError, InputError, unknown

_STDLIB = {"stdlib:docstrings": read_docstrings, "stdlib:source": read_sources}


def read_texts(
    spec: str,
    *,
    part: str = "calibration",
    limit: int | None = None,
    seed: int = 0,
    field: str | None = None,
) -> TextData:
    """The texts that ``spec`` names.

    =================== ==============================================================================
    spec                texts
    =================== ==============================================================================
    ``FILE.txt``        its lines that are not blank; ``joined`` is the file as it is
    ``FILE.jsonl``      the field ``field`` of every line; without it ``text``, or the only one with text
    ``stdlib:docstrings`` sentences out of the docstrings of the standard library of the running Python
    ``stdlib:source``   its source files, one text each
    =================== ==============================================================================

    The standard library is divided into a calibration and an evaluation part that share no module and no
    text. A file belongs to whichever ``part`` it is read for: give different files to the two.

    ``limit`` is a number of texts. Of a file they are drawn with ``seed`` and stay in order; ``joined`` then
    is those lines only. The standard library is in an order drawn with ``seed``.

    Raises FileError for a file that is missing or binary; InputError for an empty one, for a JSONL file
    without the field, for a ``field`` where there are none, and for other specs.
    """
    check_part(part)
    if limit is not None and limit < 1:
        raise InputError(f"limit is a number of texts, at least 1; got {limit}.")
    if spec.startswith("stdlib:"):
        return _read_stdlib(spec, part, limit, seed, field)
    path = Path(spec)
    if spec.startswith("datasets:"):
        raise InputError(
            f"read_texts knows files and the standard library; {spec!r} is read by eckart.hf.datasets_source.texts_of."
        )
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise _unknown_spec(spec, path)
    if path.suffix.lower() == ".jsonl":
        return _text_data(spec, _drawn(read_records(path, field), limit, seed), part)
    _refuse_field(spec, field)
    lines, content = read_lines(path)
    drawn = _drawn(lines, limit, seed)
    return _text_data(spec, drawn, part, running=content if drawn is lines else "\n".join(drawn))


def _read_stdlib(spec: str, part: str, limit: int | None, seed: int, field: str | None) -> TextData:
    if spec not in _STDLIB:
        raise InputError(unknown("part of the standard library", spec, _STDLIB))
    _refuse_field(spec, field)
    texts = _STDLIB[spec](part, limit, seed)
    return _text_data(f"{spec} of Python {platform.python_version()}", texts, part)


def _text_data(name: str, texts: list[str], part: str, running: str | None = None) -> TextData:
    if not texts:
        raise InputError(f"{name}: expected at least one text that is not blank, got none.")
    sha256 = hash_texts(texts if running is None else [running])
    return TextData(texts=tuple(texts), name=name, sha256=sha256, part=part, running=running)


def _drawn(texts: list[str], limit: int | None, seed: int) -> list[str]:
    if limit is None or limit >= len(texts):
        return texts
    return [texts[i] for i in sorted(Random(seed).sample(range(len(texts)), limit))]


def _refuse_field(spec: str, field: str | None) -> None:
    if field is not None:
        raise InputError(f"a field names a column of a .jsonl file; {spec!r} has none. Leave out field={field!r}.")


def _unknown_spec(spec: str, path: Path) -> InputError | FileError:
    expected = f"a {' or '.join(SUFFIXES)} file, {', '.join(_STDLIB)}, or datasets:NAME"
    if path.is_dir():
        return FileError(f"{spec} is a folder; expected {expected}.")
    if path.is_file():
        return InputError(
            f"{spec}: files of kind {path.suffix or 'without ending'!r} are not read; expected {expected}."
        )
    return InputError(f"{unknown('data', spec, _STDLIB)} Expected {expected}.")
