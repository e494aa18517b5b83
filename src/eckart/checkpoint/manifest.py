"""``eckart.json``: how the model in a folder was made, so that it can be made again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from eckart.errors import FileError, problems

MANIFEST = "eckart.json"
FORMAT_VERSION = 1
FEATURES: frozenset[str] = frozenset()
"""What a manifest may list under ``requires`` for this version to read it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything but the weights. All values are JSON values."""

    base: str
    """Name or path of the original model."""
    fingerprint: str
    """Of the original model (:func:`eckart.arch.fingerprint`)."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    outcome: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    modules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Every factored layer by name (:func:`eckart.layers.describe`)."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each file beside the manifest."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What the moments were collected on."""
    command: str = ""
    version: str = ""
    """Version of Eckart that wrote it."""
    requires: tuple[str, ...] = ()
    """Features that a reader has to know; the way for later versions to refuse being misread."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """JSON values, defaults left out."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["requires"] = list(self.requires)
        kept = {"format_version", "base", "fingerprint"}
        return {name: value for name, value in found.items() if name in kept or value}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Unknown keys are left alone; a later format version or required feature raises FileError."""
        if not isinstance(value, dict):
            raise FileError(f"{MANIFEST} should hold a JSON object; got {type(value).__name__}.")
        version, requires = value.get("format_version"), value.get("requires", [])
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise FileError(f"{MANIFEST} has no valid format_version; got {version!r}.")
        strange = sorted(set(requires) - FEATURES) if _is_strings(requires) else [repr(requires)]
        if version > FORMAT_VERSION or strange:
            later = version > FORMAT_VERSION
            why = f"format version {version}" if later else f"requires {', '.join(strange)}"
            raise FileError(f"{MANIFEST} is from a later Eckart ({why}): pip install -U eckart.")
        wrong = [
            f"{name} should be {kind.__name__}, got {type(value[name]).__name__}"
            for name, kind in _KINDS.items()
            if name in value and not isinstance(value[name], kind)
        ]
        wrong += [f"{name} is missing" for name in ("base", "fingerprint") if name not in value]
        if wrong:
            raise FileError(problems(f"{MANIFEST} is damaged", wrong))
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in value.items() if k in known} | {"requires": tuple(requires)})

    def write(self, folder: str | Path) -> None:
        """Write ``eckart.json`` into ``folder``, with the sizes of the other files that lie there now."""
        folder = Path(folder)
        beside = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(beside)}
        text = json.dumps({**self.to_json(), "files": sizes}, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Raises FileError where there is none, or none that can be read."""
        path = Path(folder) / MANIFEST
        return cls.from_json(read_json(path))


_KINDS: dict[str, type] = {
    "base": str,
    "fingerprint": str,
    "plan": dict,
    "outcome": dict,
    "calibration": dict,
    "modules": dict,
    "files": dict,
    "command": str,
    "version": str,
}


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises FileError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"there is no {path.name} in {path.parent}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON ({error}): cut short or damaged.") from error
