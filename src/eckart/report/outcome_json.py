"""Records of a run as JSON and back: outcomes and evaluations, nothing lost, nothing unknown accepted."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from eckart.errors import InputError, unknown
from eckart.records import Evaluation, Outcome

Record = TypeVar("Record")


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """``outcome`` as a tree of dicts, lists, strings and numbers."""
    return _plain(outcome)  # type: ignore[no-any-return]


def outcome_from_json(tree: Mapping[str, Any] | str) -> Outcome:
    """Back from :func:`outcome_to_json` or its JSON text; InputError on missing, unknown or wrong entries."""
    return _read(Outcome, _parsed(tree), "outcome")  # type: ignore[no-any-return]


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """``evaluation`` as a tree of dicts, lists, strings and numbers."""
    return _plain(evaluation)  # type: ignore[no-any-return]


def evaluation_from_json(tree: Mapping[str, Any] | str) -> Evaluation:
    """Back from :func:`evaluation_to_json` or its JSON text; InputError as for outcomes."""
    return _read(Evaluation, _parsed(tree), "evaluation")  # type: ignore[no-any-return]


def _parsed(tree: Mapping[str, Any] | str) -> Any:
    if not isinstance(tree, str):
        return tree
    try:
        return json.loads(tree)
    except json.JSONDecodeError as problem:
        raise InputError(f"expected JSON; line {problem.lineno}, column {problem.colno}: {problem.msg}.") from problem


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"expected plain data in a record; got {type(value).__name__} {value!r}.")


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``kind``; ``where`` names the place in messages."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where)
    if origin in (Union, types.UnionType):
        options = [k for k in get_args(kind) if k is not type(None)]
        return None if value is None and len(options) < len(get_args(kind)) else _read(options[0], value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise InputError(f"{where}: {unknown('value', str(value), map(str, get_args(kind)))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(where, "a list", value)
        return tuple(_read(get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, "an object", value)
        return {k: _read(get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(where, kind.__name__, value)
    return value


def _read_record(kind: type[Record], value: Any, where: str) -> Record:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    for key in value:
        if key not in hints:
            raise InputError(f"{where}: {unknown('entry', str(key), (f.name for f in fields))}")
    for f in fields:
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if f.name not in value and not optional:
            raise InputError(f"{where}: the entry {f.name!r} is missing.")
    return kind(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in value.items()})


def _wrong(where: str, expected: str, value: Any) -> InputError:
    return InputError(f"{where}: expected {expected}; got {type(value).__name__} {value!r}.")
