"""What the name of a tensor says: its place in the model and the kind of map it is. No model class is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from eckart.errors import InputError, problems, unknown
from eckart.records import SiteKind

_TABLES = re.compile(r"(?:^|_)(?:embed|embedding|embeddings|wte|wpe|shared)$|^embed_(?:tokens|positions)$")
"""Last part of the name of a module that is a table of embeddings."""
_INPUT_FIRST = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)\.weight$")
"""Weights that GPT-2 stores (in, out)."""
INPUT_FIRST_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""``model_type`` of the families of transformers that use its Conv1D."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands."""

    role: str
    """The path below its block, or the whole path outside of the blocks; without “.weight” at its end."""
    depth: int | None
    """Index of its block; None outside of the blocks."""


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of every tensor by its name: ``encoder.layer.3.attention.self.query.weight`` is at depth 3.

    A block is what a number in a name counts, the first one below which there is more than one tensor's own name. Where
    there are several lists of blocks, as of an encoder and a decoder, roles begin with what tells the lists apart.
    """
    found: dict[str, tuple[str, int, str]] = {}
    every = list(names)
    for name in every:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-2]) if part.isdecimal()), None)
        if at is not None:
            found[name] = (".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))
    labels = _labels(sorted({stem for stem, _, _ in found.values()}))
    result = {}
    for name in every:
        if name not in found:
            result[name] = Place(name.removesuffix(".weight"), None)
        else:
            stem, depth, role = found[name]
            label = f"{labels[stem]}." if labels[stem] else ""
            result[name] = Place(f"{label}{role.removesuffix('.weight')}", depth)
    return result


def _labels(stems: Sequence[str]) -> dict[str, str]:
    """Each path without the parts that all of them begin and end with."""
    if len(stems) < 2:
        return dict.fromkeys(stems, "")
    parts = [stem.split(".") for stem in stems]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({p[-1 - i] for p in parts}) > 1), shortest - start)
    return {stem: ".".join(p[start : len(p) - end]) for stem, p in zip(stems, parts, strict=True)}


def kind_of(name: str, shape: Sequence[int], input_first: bool = False) -> SiteKind:
    """The kind of map by name and shape: a table of embeddings, a convolution, a stack of experts, else a map.

    The spectrum of a 2-D weight is the same for every kind; its orientation is not. ``input_first``: the model is of a
    family that stores some maps (in, out).
    """
    if len(shape) >= 4:
        return "conv"
    if len(shape) == 3:
        # Kernels of 1-D convolutions are short; the matrices of a stack are not.
        return "conv" if shape[2] < 16 and "expert" not in name else "experts"
    parts = name.split(".")
    if _TABLES.search(parts[-2] if len(parts) > 1 else parts[-1]):
        return "embedding"
    return "conv1d" if input_first and _INPUT_FIRST.search(name) else "linear"


def left_out(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """Names that patterns leave out, with the reason.

    A pattern is a glob, matched against the name or any tail of it that starts after a dot, with or without the
    “.weight” at its end, or ``re:`` and a regular expression. Raises InputError for patterns that match nothing.
    """
    faults = [fault for pattern in (*include, *exclude) if (fault := _fault(pattern, names))]
    if faults:
        raise InputError(problems("tensor patterns", faults))
    reasons = {}
    for name in names:
        if include and not any(_matches(pattern, name) for pattern in include):
            reasons[name] = "left out: not among the included"
        elif taken := next((pattern for pattern in exclude if _matches(pattern, name)), ""):
            reasons[name] = f"left out by {taken!r}"
    return reasons


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    forms = (name, name.removesuffix(".weight"))
    return any(fnmatchcase(form, pattern) or fnmatchcase(form, f"*.{pattern}") for form in forms)


def _fault(pattern: str, names: Sequence[str]) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return f"{pattern!r} is not a regular expression: {error}"
    return "" if any(_matches(pattern, name) for name in names) else unknown("tensor pattern", pattern, names)


def partners(names: Iterable[str], others: Mapping[str, object] | Iterable[str]) -> dict[str, str]:
    """For each name the one of ``others`` that is the same, or the only one that differs by parts before it.

    So ``bert.encoder.layer.0…`` finds ``encoder.layer.0…`` and the other way round. Names without a partner are
    missing.
    """
    known = list(others)
    exact = set(known)
    tails: dict[str, list[str]] = {}
    for other in known:
        parts = other.split(".")
        for i in range(len(parts)):
            tails.setdefault(".".join(parts[i:]), []).append(other)
    found = {}
    for name in names:
        if name in exact:
            found[name] = name
            continue
        parts = name.split(".")
        longer = tails.get(name, [])
        shorter = [tail for i in range(1, len(parts) - 1) if (tail := ".".join(parts[i:])) in exact]
        candidates = longer or shorter[:1]
        if len(candidates) == 1:
            found[name] = candidates[0]
    return found
