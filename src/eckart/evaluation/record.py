"""An evaluation as JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

from eckart.errors import InputError, problems, unknown
from eckart.records import Evaluation, Interval, Latency, Size


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings, ready for ``json.dumps``; the speedup is written along."""
    content = asdict(evaluation)
    content["metrics"] = {name: asdict(value) for name, value in evaluation.metrics.items()}
    content["latency"] = [{**asdict(one), "speedup": one.speedup} for one in evaluation.latency]
    content["warnings"] = list(evaluation.warnings)
    return content


def evaluation_from_json(content: Any) -> Evaluation:
    """The record that ``evaluation_to_json`` wrote.

    Raises InputError, all problems at once, for keys that are missing or unknown and values of another kind.
    """
    found: list[str] = []
    given = _keys(content, Evaluation, "evaluation", found)
    metrics = given.get("metrics", {})
    latency = given.get("latency", [])
    if not isinstance(metrics, Mapping):
        found.append("metrics: expected an object of figures.")
        metrics = {}
    if not isinstance(latency, list):
        found.append("latency: expected a list.")
        latency = []
    parts = {name: _numbers(value, Interval, f"metrics.{name}", found) for name, value in metrics.items()}
    times = [
        _numbers({k: v for k, v in one.items() if k != "speedup"}, Latency, f"latency[{i}]", found)
        if isinstance(one, Mapping)
        else found.append(f"latency[{i}]: expected an object.")
        for i, one in enumerate(latency)
    ]
    sizes = {
        key: _numbers(given[key], Size, key, found) for key in ("model_size", "base_size") if key in given
    }
    tasks = get_args(get_type_hints(Evaluation)["task"])
    if "task" in given and given["task"] not in tasks:
        found.append(unknown("task", str(given["task"]), tasks))
    for key, kind in (("protocol", Mapping), ("disk_bytes", Mapping), ("warnings", list)):
        if key in given and not isinstance(given[key], kind):
            found.append(f"{key}: expected {'a list' if kind is list else 'an object'}.")
    if found:
        raise InputError(problems("this is not an evaluation that Eckart wrote", found))
    return Evaluation(
        task=given["task"],
        metrics={name: Interval(**values) for name, values in parts.items()},
        protocol=dict(given["protocol"]),
        model_size=Size(**sizes["model_size"]),
        base_size=Size(**sizes["base_size"]),
        disk_bytes=dict(given.get("disk_bytes", {})),
        latency=tuple(Latency(**one) for one in times if one is not None),
        warnings=tuple(given.get("warnings", ())),
    )


_OPTIONAL = {"disk_bytes", "latency", "warnings", "unit"}


def _keys(content: Any, kind: type[Any], where: str, found: list[str]) -> dict[str, Any]:
    """The content as a dict; what is missing or unknown goes to ``found``."""
    if not isinstance(content, Mapping):
        found.append(f"{where}: expected an object, got {type(content).__name__}.")
        return {}
    names = [f.name for f in fields(kind)]
    found += [f"{where}: {unknown('key', str(key), names)}" for key in content if key not in names]
    found += [
        f"{where}: {name} is missing." for name in names if name not in content and name not in _OPTIONAL
    ]
    return dict(content)


def _numbers(content: Any, kind: type[Any], where: str, found: list[str]) -> dict[str, Any]:
    """The fields of a record of numbers (and a unit)."""
    given = _keys(content, kind, where, found)
    for key, value in given.items():
        wanted: tuple[type, ...] = (str,) if key == "unit" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            found.append(f"{where}.{key}: expected a {'text' if key == 'unit' else 'number'}, got {value!r}.")
    return given
