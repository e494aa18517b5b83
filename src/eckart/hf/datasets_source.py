"""Texts out of the ``datasets`` library, by name."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from typing import Any

from eckart.data import TextData, read_texts
from eckart.errors import InputError, unknown

PREFIX = "datasets:"
SPLITS = ("train", "validation", "test")
_USUAL: dict[str, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("validation", "test"),
}
_FIELDS = ("text", "sentence", "content", "document")
_BUFFER = 10_000


def texts_of(
    spec: str,
    *,
    part: str = "calibration",
    limit: int | None = None,
    seed: int = 0,
    field: str | None = None,
) -> TextData:
    """Texts of any source: what ``read_texts`` knows, and ``datasets:NAME[:CONFIG][:SPLIT]``."""
    if spec.startswith(PREFIX):
        return read_dataset(spec, part=part, limit=limit, seed=seed, field=field)
    return read_texts(spec, part=part, limit=limit, seed=seed, field=field)


def read_dataset(
    spec: str,
    *,
    part: str = "calibration",
    limit: int | None = None,
    seed: int = 0,
    field: str | None = None,
) -> TextData:
    """Texts of ``datasets:NAME[:CONFIG][:SPLIT]``, a hub name or a folder that ``load_dataset`` reads.

    The last piece is a split where it is train, validation or test, else the config. Without a split,
    calibration takes train and evaluation validation or test; a data set with train alone is divided by the
    hash of each text, four parts for calibration and one for evaluation, so that no text is in both. A split
    that is named is taken whole: name different ones for the two parts.
    ``field`` None takes the first of text, sentence, content, document that exists. Texts are shuffled with
    ``seed`` (within a buffer of 10,000 where the data are streamed) and cut to ``limit``.

    Raises InputError where ``datasets`` is missing, the hub cannot be reached, and for names, configs, splits
    and fields that do not exist.
    """
    name, config, split = parse_spec(spec)
    datasets = _library()
    try:
        splits = datasets.get_dataset_split_names(name, config)
        chosen, divided = choose_split(splits, split, part)
        streaming = limit is not None and not datasets.config.HF_HUB_OFFLINE
        rows = datasets.load_dataset(name, config, split=chosen, streaming=streaming)
        buffer = {"buffer_size": _BUFFER} if streaming else {}
        rows = rows.shuffle(seed=seed, **buffer)
        column = choose_field(rows.column_names, field)
        texts = _take((row[column] for row in rows), part if divided else None, limit, column)
    except InputError:
        raise
    except Exception as error:  # the library raises errors of many packages for an unknown name or no network
        raise InputError(
            f"the data set {spec!r} could not be read: {type(error).__name__}: {error}. Expected "
            f"{PREFIX}NAME[:CONFIG][:SPLIT]; check the spelling, the connection, and HF_HUB_OFFLINE. "
            "A text or JSONL file, or stdlib:docstrings, needs no network."
        ) from error
    if not texts:
        raise InputError(f"{spec!r} holds no text in the field {column!r}. Name another with --field.")
    return TextData.of(texts, part=part, name=f"{PREFIX}{name}:{config or 'default'}:{chosen}")


def parse_spec(spec: str) -> tuple[str, str | None, str | None]:
    """(name, config, split) of ``datasets:NAME[:CONFIG][:SPLIT]``; raises InputError for other shapes."""
    name, *rest = spec.removeprefix(PREFIX).split(":")
    if not spec.startswith(PREFIX) or not name or len(rest) > 2 or "" in rest:
        raise InputError(
            f"expected {PREFIX}NAME[:CONFIG][:SPLIT], as {PREFIX}wikitext:wikitext-2-raw-v1; got {spec!r}."
        )
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and rest[0] in SPLITS:
        return name, None, rest[0]
    return name, rest[0] if rest else None, None


def choose_split(splits: Iterable[str], split: str | None, part: str) -> tuple[str, bool]:
    """The split to read, and whether it must be divided into the two parts by hash."""
    known = list(splits)
    if split is not None:
        if split not in known:
            raise InputError(unknown("split", split, known))
        return split, False
    held_out = [name for name in _USUAL["evaluation"] if name in known]
    if "train" in known and held_out:
        return ("train" if part == "calibration" else held_out[0]), False
    if len(known) == 1:
        return known[0], True
    raise InputError(f"the data set has the splits {', '.join(known)}; name one: {PREFIX}NAME:CONFIG:SPLIT.")


def choose_field(columns: Iterable[str] | None, field: str | None) -> str:
    """The column with the text; raises InputError where it does not exist or none looks like text."""
    known = list(columns or ())
    if field is not None:
        if known and field not in known:
            raise InputError(unknown("field", field, known))
        return field
    found = next((name for name in _FIELDS if name in known), None)
    if found is None:
        raise InputError(f"which field holds the text? Name one with --field: {', '.join(known) or 'unknown'}.")
    return found


def _take(values: Iterable[Any], part: str | None, limit: int | None, column: str) -> list[str]:
    texts: list[str] = []
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"the field {column!r} holds {type(value).__name__}, expected text. Name another.")
        if not value.strip() or (part is not None and _part_of(value) != part):
            continue
        texts.append(value)
        if limit is not None and len(texts) == limit:
            break
    return texts


def _part_of(text: str) -> str:
    return "evaluation" if hashlib.sha256(text.encode()).digest()[0] % 5 == 0 else "calibration"


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(
            f"{PREFIX}… needs the package `datasets`: pip install 'eckart[hf]'. "
            "A text or JSONL file, or stdlib:docstrings, needs nothing."
        ) from error
