"""Examples to train on: texts, prompts with completions, or texts with labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from eckart.data.files import decoded
from eckart.errors import FileError, InputError, problems

ExampleKind = Literal["running", "text", "completion", "label"]
SHOWN = 20
"""Problems of a file that are listed; of the others the number is said."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What one file holds, all of one kind."""

    kind: ExampleKind
    """``running``: one long text; ``text``: one each; ``completion``: what follows a prompt; ``label``: a class."""
    rows: tuple[tuple[str, str], ...]
    """(text, ""), (prompt, completion) or (text, label)."""
    name: str
    sha256: str
    """Of the file's bytes, in hex."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The different labels, sorted: numbers by size, else as text."""
        found = {label for _, label in self.rows} if self.kind == "label" else set()
        return tuple(sorted(found, key=lambda t: (0, int(t), t) if t.lstrip("-").isdigit() else (1, 0, t)))


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the fields of a .jsonl file."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"

    def pairs(self) -> dict[ExampleKind, tuple[str, ...]]:
        """The fields that each kind of example has; of two kinds that fit, the first is meant."""
        return {"completion": (self.prompt, self.completion), "label": (self.text, self.label), "text": (self.text,)}


def read_examples(path: Path, fields: Fields = Fields()) -> Examples:
    """The examples of a .txt or .jsonl file.

    A .txt file is one running text. The kind of a .jsonl file is that of its first object: with prompt and completion,
    with text and label (a text, an integer, true or false), or with text only; every other line must have the same
    fields. Raises FileError for a file that cannot be read, and InputError that names every line which is no JSON
    object, lacks a field, is empty, or holds another type.
    """
    content = decoded(path)
    digest = sha256(path.read_bytes()).hexdigest()
    if path.suffix.lower() == ".txt":
        return Examples(kind="running", rows=((content, ""),), name=str(path), sha256=digest)
    if path.suffix.lower() != ".jsonl":
        raise FileError(f"{path}: examples are read from .jsonl files, running text from .txt files.")
    wrong: list[str] = []
    records = list(_objects(content, wrong))
    kind = next((kind for _, record in records if (kind := _kind(record, fields))), None)
    if kind is None:
        known = "; ".join(" and ".join(names) for names in fields.pairs().values())
        seen = ", ".join(records[0][1]) if records else "no object"
        wrong.insert(0, f"no line has the fields of an example, which are {known}; the first has {seen or 'none'}")
    rows = [row for at, record in records if kind and (row := _row(record, fields.pairs()[kind], at, kind, wrong))]
    wrong.sort(key=_line)
    if wrong:
        rest = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise InputError(problems(f"{path} cannot be trained on", [*wrong[:SHOWN], *rest]))
    found = Examples(kind=kind or "text", rows=tuple(rows), name=str(path), sha256=digest)
    if kind == "label" and len(found.labels) < 2:
        raise InputError(f"{path} has only the label {found.labels[0]!r}; classes need at least two.")
    return found


def _objects(content: str, wrong: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and objects; adds a sentence to ``wrong`` for every other line."""
    lines = content.split("\n")
    for at, line in enumerate(lines[:-1] if not lines[-1].strip() else lines, start=1):
        if not line.strip():
            wrong.append(f"line {at}: empty")
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            wrong.append(f"line {at}: not JSON ({error.msg} at column {error.colno})")
            continue
        if isinstance(record, dict):
            yield at, record
        else:
            wrong.append(f"line {at}: expected a JSON object, got {type(record).__name__}")


def _kind(record: Mapping[str, Any], fields: Fields) -> ExampleKind | None:
    return next((kind for kind, names in fields.pairs().items() if all(name in record for name in names)), None)


def _row(
    record: Mapping[str, Any], names: Sequence[str], at: int, kind: ExampleKind, wrong: list[str]
) -> tuple[str, str] | None:
    """The values of the fields as text, or None with a sentence for each that cannot be used."""
    found, before = [], len(wrong)
    for name in names:
        value = record.get(name)
        is_label = kind == "label" and name == names[1]
        if name not in record:
            wrong.append(f"line {at}: no field {name!r}; it has {', '.join(record) or 'none'}")
        elif not isinstance(value, (str, int) if is_label else str):
            expected = "a text or an integer" if is_label else "text"
            wrong.append(f"line {at}: expected {expected} in {name!r}, got {type(value).__name__}")
        elif isinstance(value, str) and not value.strip() and not (kind == "completion" and name == names[0]):
            wrong.append(f"line {at}: the field {name!r} is empty")
        else:
            found.append(json.dumps(value) if isinstance(value, bool) else str(value))
    if len(wrong) > before:
        return None
    return (found[0], found[1] if len(found) > 1 else "")


def _line(sentence: str) -> int:
    number = sentence.removeprefix("line ").partition(":")[0]
    return int(number) if number.isdigit() else 0
