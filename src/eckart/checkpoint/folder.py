"""What lies in a model folder, whether it is whole, and where it loads. Reads headers, never weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from eckart.checkpoint.atomic import leftovers
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.checkpoint.manifest import MANIFEST, Manifest, read_json
from eckart.errors import FileError, problems

FolderKind = Literal["eckart", "remote-code", "dense", "unknown"]

LOADS: dict[FolderKind, str] = {
    "eckart": "transformers, after `import eckart`",
    "remote-code": "transformers with trust_remote_code=True; Eckart is not needed",
    "dense": "plain transformers",
    "unknown": "nowhere that Eckart knows of",
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class FolderState:
    """The findings of :func:`inspect_folder`."""

    path: str
    kind: FolderKind
    architecture: str
    """First of ``architectures`` in config.json, "" where it names none."""
    weight_files: Mapping[str, int]
    """Bytes of each weight file."""
    tensors: int
    parameters: int
    """Stored floating-point numbers."""
    modules: Mapping[str, Mapping[str, Any]]
    """Factored layers by name."""
    manifest: Manifest | None
    problems: tuple[str, ...]
    """What is wrong; empty for a whole folder."""
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return not self.problems

    @property
    def loads(self) -> str:
        """Where the folder loads, in words."""
        return LOADS[self.kind]

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.weight_files.values())

    def require_whole(self) -> FolderState:
        """Itself, or FileError with every problem."""
        if self.problems:
            raise FileError(problems(f"{self.path} is not whole", self.problems))
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "whole": self.whole,
            "loads": self.loads,
            "architecture": self.architecture,
            "weight_files": dict(self.weight_files),
            "bytes": self.bytes,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "modules": {name: dict(entry) for name, entry in self.modules.items()},
            "manifest": None if self.manifest is None else self.manifest.to_json(),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def inspect_folder(path: str | Path) -> FolderState:
    """Look at a model folder: config, index, headers and sizes of the weight files, manifest.

    Raises FileError only where there is no folder at all; all else that is wrong is listed in the result.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileError(f"expected a model folder; {folder} {what}.")
    found: list[str] = []
    notes: list[str] = []
    config = _config(folder, found)
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    method = quantization.get("quant_method")
    kind: FolderKind = "unknown"
    if config:
        kind = "eckart" if method == "eckart" else "remote-code" if config.get("auto_map") else "dense"
    if method not in (None, "eckart"):
        notes.append(f"the weights are quantised by {method}")
    files = _weight_files(folder, found)
    tensors = _tensors(folder, files, found)
    entries = quantization.get("modules") if kind == "eckart" else {}
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        found.append("config.json: quantization_config.modules should map names to objects")
        entries = {}
    if kind == "eckart":
        _check_modules(entries, tensors, found)
    if kind == "remote-code":
        _check_code(folder, config["auto_map"], found)
    manifest = _manifest(folder, found, notes)
    if kind == "eckart" and manifest is None and not (folder / MANIFEST).exists():
        notes.append(f"there is no {MANIFEST}, so how the model was made is not recorded")
    notes += [f"{left.name} beside it was left by a killed process" for left in leftovers(folder)]
    architectures = config.get("architectures")
    floats = [t for t in tensors.values() if t.dtype.startswith(("F", "BF"))]
    return FolderState(
        path=str(folder),
        kind=kind,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        weight_files={name: (folder / name).stat().st_size for name in files},
        tensors=len(tensors),
        parameters=sum(t.numel for t in floats),
        modules=entries,
        manifest=manifest,
        problems=tuple(found),
        notes=tuple(notes),
    )


def _config(folder: Path, found: list[str]) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except FileError as error:
        found.append(str(error))
        return {}
    if not isinstance(config, dict):
        found.append("config.json should hold a JSON object")
        return {}
    return config


def climbs_out(name: str) -> bool:
    """Whether a file name from a JSON file points anywhere but into the folder itself."""
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return not name or absolute or ".." in parts or "\0" in name


def _weight_files(folder: Path, found: list[str]) -> list[str]:
    """Names of the weight files that exist, by the index where there is one."""
    if not (folder / _INDEX).is_file():
        if (folder / _SINGLE).is_file():
            return [_SINGLE]
        others = sorted(p.name for p in folder.glob("*.bin"))
        if others:
            found.append(f"the weights are pickled ({others[0]}); Eckart reads safetensors only")
        else:
            found.append(f"there are no weights: neither {_SINGLE} nor {_INDEX}")
        return []
    try:
        index = read_json(folder / _INDEX)
    except FileError as error:
        found.append(str(error))
        return []
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        found.append(f"{_INDEX} has no valid weight_map")
        return []
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if climbs_out(name)]
    found += [f"{_INDEX} names {name!r}, which leads out of the folder" for name in outside]
    names = [name for name in names if name not in outside]
    found += [f"{name} is missing" for name in names if not (folder / name).is_file()]
    return [name for name in names if (folder / name).is_file()]


def _tensors(folder: Path, files: list[str], found: list[str]) -> dict[str, TensorInfo]:
    """All tensors of the files; disagreements with the index are problems."""
    where: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    broken: set[str] = set()
    for name in files:
        try:
            header = read_header(folder / name)
        except (FileError, OSError) as error:
            found.append(str(error))
            broken.add(name)
            continue
        found += [f"{key} is in both {where[key]} and {name}" for key in header if key in where]
        where.update(dict.fromkeys(header, name))
        tensors.update(header)
    if (folder / _INDEX).is_file() and files:
        weight_map = read_json(folder / _INDEX)["weight_map"]
        lost = [key for key, name in weight_map.items() if name not in broken and where.get(key) != name]
        lost = [key for key in lost if not climbs_out(weight_map[key])]
        found += _some("in the index but not in its file", lost)
        found += _some("in a file but not in the index", [key for key in where if key not in weight_map])
    return tensors


def _some(what: str, names: list[str]) -> list[str]:
    """One line for many names."""
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what}: {', '.join(names[:3])}{more}"]


def _ranks(name: str, entry: Mapping[str, Any]) -> dict[str, int]:
    """Rank by the stem of each pair of factors that a layer needs; none for layers that own no factors."""
    if entry["kind"] in ("tied-head", "tied-embedding", "narrow", *_WHOLE) or entry.get("form") in ("rows", "columns"):
        return {}
    if entry["kind"] == "quantised":
        return {f"{name}.": entry["rank"]} if entry.get("rank") else {}
    if entry["kind"] == "experts":
        weights = entry["weights"].items()
        return {f"{name}.{weight.removesuffix('_proj')}_": spec["rank"] for weight, spec in weights}
    return {f"{name}.": entry["rank"]}


_WHOLE = {"group-sparse": "packed", "sparse": "mask", "vector-coded": "assignments", "random-features": "readout"}
"""Kinds of layers without factors, and the ending of a tensor that each has."""
_FACTOR = ("weight", "codes", "_weight_qdata")
"""Endings of the tensor that holds a factor: in floats, in integers of Eckart's, in integers of torchao's."""


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, int | None]:
    """Rank by stem of every pair ``….a.weight`` and ``….b.weight``, or ``…_a`` and ``…_b`` of experts.

    None where ``b`` is in integers, whose packed shape does not say the rank.
    """
    found: dict[str, int | None] = {}
    for key, info in tensors.items():
        stem, factor, part = key.rpartition(".b.")
        has_a = any(f"{stem}.a.{ending}" in tensors for ending in _FACTOR)
        if factor and part in _FACTOR and len(info.shape) >= 2 and has_a:
            found[f"{stem}."] = info.shape[1] if part == "weight" else None
        elif key.endswith("_b") and len(info.shape) == 3 and key[:-1] + "a" in tensors:
            found[key[:-1]] = info.shape[2]
    return found


def _check_modules(
    entries: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, TensorInfo], found: list[str]
) -> None:
    """Every factored layer has its two factors, of its rank, and every quantised or coded one its integers.

    Transformers writes some architectures (ViT, Mixtral) under other names than the modules have. So a layer
    whose name is not in the files may take any pair of its rank, or any integers, that no other layer claims.
    """
    if not tensors:
        return
    needed: dict[str, int] = {}
    for name, entry in entries.items():
        try:
            needed |= _ranks(name, entry)
        except (KeyError, AttributeError, TypeError):
            found.append(f"config.json: the entry of {name} is damaged")
    pairs = _pairs(tensors)
    unequal = [
        f"{stem} {pairs[stem]} for {rank}" for stem, rank in needed.items() if pairs.get(stem) not in (None, rank)
    ]
    free = Counter(rank for stem, rank in pairs.items() if stem not in needed)
    missing = []
    for stem, rank in needed.items():
        if stem not in pairs:
            taken = rank if free[rank] > 0 else None
            free[taken] -= 1
            if free[taken] < 0:
                missing.append(f"{stem}a and b")
    found += _some("narrower layers of another size than config.json says", _resized(entries, tensors))
    for kind, ending in {"quantised": "codes", **_WHOLE}.items():
        wanted = {f"{name}.{ending}" for name, entry in entries.items() if entry.get("kind") == kind}
        spare = sum(key.endswith(f".{ending}") for key in tensors.keys() - wanted)
        lost = sorted(wanted - tensors.keys())
        found += _some(f"{ending} of {kind} layers named in config.json but not in the weights", lost[spare:])
    found += _some("factors named in config.json but not in the weights", missing)
    found += _some("factors of another rank than config.json says", unequal)
    stopping = any(entry.get("kind") != "narrow" for entry in entries.values())  # another shape stops it by itself
    if stopping and not any(info.numel == 0 for info in tensors.values()):
        found.append(
            "the empty tensors are missing that make transformers fail without Eckart: "
            "it would load random weights with no more than a warning. Save the model again."
        )


def _resized(entries: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Narrower layers whose weights are there in another shape."""
    found = []
    for name, entry in entries.items():
        plain, padded = tensors.get(f"{name}.weight"), tensors.get(f"{name}.a.weight")
        if entry.get("kind") == "narrow" and plain is not None:
            wrong = sorted(plain.shape) != sorted((entry.get("out", 0), entry.get("in", 0)))
        elif entry.get("form") in ("rows", "columns") and padded is not None:
            wrong = entry.get("rank") not in padded.shape
        else:
            wrong = False
        found += [name] if wrong else []
    return found


def _check_code(folder: Path, auto_map: Any, found: list[str]) -> None:
    values = auto_map.values() if isinstance(auto_map, dict) else []
    modules = {str(value).rpartition("--")[2].split(".")[0] for value in values}
    lost = [name for name in sorted(modules) if not (folder / f"{name}.py").is_file()]
    found += [f"{name}.py is missing, which auto_map names" for name in lost]


def _manifest(folder: Path, found: list[str], notes: list[str]) -> Manifest | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = Manifest.read(folder)
    except FileError as error:
        found.append(str(error))
        return None
    for name, size in manifest.files.items():
        if climbs_out(name):
            found.append(f"{MANIFEST} names {name!r}, which leads out of the folder")
        elif not (folder / name).is_file():
            found.append(f"{name} is missing, which {MANIFEST} lists")
        elif (actual := (folder / name).stat().st_size) != size:
            weights = name.endswith(".safetensors")
            line = f"{name} has {actual} bytes; {MANIFEST} says {size}"
            (found if weights else notes).append(line)
    return manifest
