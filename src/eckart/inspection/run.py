"""The look at a whole model: weight after weight, and what follows."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from eckart.errors import InputError, MismatchError, problems, unknown
from eckart.inspection.cache import Cache, digest, key_of
from eckart.inspection.measure import Measured, measure
from eckart.inspection.names import Place, left_out, partners, places
from eckart.inspection.observe import observations
from eckart.inspection.record import Inspection, MatrixFacts, Tier
from eckart.inspection.source import Entry, Source, WeightsLike, open_source
from eckart.records import Progress, silent

MOST_GRAM_BYTES = 8 << 30
"""Memory that the Gram matrix of one weight may take: 8 GiB, that of a smaller side of 32768."""


def inspect_weights(
    source: WeightsLike,
    *,
    tier: Tier = "standard",
    base: WeightsLike | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    most_gram_bytes: int = MOST_GRAM_BYTES,
    progress: Progress = silent,
) -> Inspection:
    """Measure every weight of a model, and say what stands out.

    ``source``: a ``.safetensors`` file, a folder, an nn.Module or a mapping of tensors; no model class is needed.
    Weights are read one at a time, and of files as views, so that memory holds one Gram matrix and blocks of one
    weight. Every tensor is listed; what has no spectrum says why in ``skipped``.

    ========== =============================================================================================
    tier       measured of every weight
    ========== =============================================================================================
    quick      Frobenius norm, σ₁ and stable rank by Lanczos, exponent by windows: some seconds per GB
    standard   every singular value exactly: ranks, noise, spikes, tails; defects (6 s at 4096 × 11008 on one core)
    full       also rows and columns that repeat up to a factor; with a base, the overlap of the change with it
    ========== =============================================================================================

    ``base``: the same kinds of source; what changed against it gives findings that begin with ``delta_``. Tensors are
    matched by name, also where one model is inside of another (``bert.`` in front). One without a counterpart of its
    shape says so in ``base``; MismatchError where no tensor has one.

    ``include`` and ``exclude``: patterns of names, globs against the name or any tail of it after a dot
    (``attention.self.*``) or ``re:`` and a regular expression. ``cache``: a folder that keeps what was measured by the
    hash of the numbers, so that a run that was ended is taken up again. ``most_gram_bytes``: a weight whose smaller
    side p needs more than this (8 p² bytes) is listed as skipped. ``progress`` counts work, not tensors.

    Raises InputError for sources, tiers and patterns that cannot be used, FileError for files that are missing, cut
    short or pickled.
    """
    start = time.perf_counter()
    if tier not in get_args(Tier):
        raise InputError(unknown("tier", str(tier), get_args(Tier)))
    opened = open_source(source)
    other = None if base is None else open_source(base)
    names = [entry.name for entry in opened.entries]
    reasons = left_out(names, include, exclude)
    standing = places(names)
    matched = _matched(opened, other)
    store = Cache(None if cache is None else Path(cache))
    total = hashlib.sha256()
    todo = [_work(entry) for entry in opened.entries]
    facts = []
    progress("weights", 0, sum(todo))
    for index, entry in enumerate(opened.entries):
        reason = entry.reason or reasons.get(entry.name, "") or _too_large(entry, tier, most_gram_bytes)
        if reason:
            facts.append(_facts(entry, standing[entry.name], reason))
        else:
            facts.append(_measured(opened, other, entry, matched, tier, store, standing[entry.name], total))
        progress("weights", sum(todo[: index + 1]), sum(todo))
    missing = [] if other is None else _missing(opened, other, matched)
    meta = _meta(opened, facts, store, total.hexdigest(), missing) | {"seconds": time.perf_counter() - start}
    return Inspection(
        title=_title(opened.label),
        source=opened.label,
        tier=tier,
        matrices=tuple(facts),
        observations=observations(facts, opened.label, missing),
        base="" if other is None else other.label,
        meta=meta,
    )


def _matched(source: Source, base: Source | None) -> dict[str, str]:
    if base is None:
        return {}
    matched = partners((entry.name for entry in source.entries), [entry.name for entry in base.entries])
    shapes = {entry.name: entry.shape for entry in base.entries}
    fitting = [
        e for e in source.entries if e.name in matched and shapes[matched[e.name]] == e.shape and len(e.shape) > 1
    ]
    if not fitting:
        own, theirs = source.entries[:2], base.entries[:2]
        raise MismatchError(
            problems(
                f"no weight of {source.label} has a counterpart of its shape in {base.label}; is it another model?",
                [f"{e.name} {list(e.shape)} here" for e in own] + [f"{e.name} {list(e.shape)} there" for e in theirs],
            )
        )
    return matched


def _missing(source: Source, base: Source, matched: Mapping[str, str]) -> list[str]:
    """Tensors that only the base has."""
    taken = set(matched.values())
    return [entry.name for entry in base.entries if entry.name not in taken]


def _work(entry: Entry) -> int:
    """About how long a weight takes, in millions of multiply-adds, at least 1."""
    slices, out, columns = entry.matrices
    p, q = min(out, columns), max(out, columns)
    return 1 + int(slices * (p * p * q / 2 + 4 * p**3) / 1e6)


def _too_large(entry: Entry, tier: Tier, most: int) -> str:
    _, out, columns = entry.matrices
    needed = 8 * min(out, columns) ** 2
    if tier == "quick" or needed <= most:
        return ""
    return (
        f"its Gram matrix takes {needed / 2**30:.1f} GiB, more than the {most / 2**30:.1f} GiB allowed; raise "
        "most_gram_bytes or take the tier quick"
    )


def _measured(
    source: Source,
    base: Source | None,
    entry: Entry,
    matched: Mapping[str, str],
    tier: Tier,
    store: Cache,
    place: Place,
    total: Any,
) -> MatrixFacts:
    W = source.read(entry.name)
    why, other = _counterpart(base, entry, matched)
    own = digest(W)
    total.update(f"{entry.name} {own}\n".encode())
    key = key_of(entry, tier, own, "" if other is None else digest(other))
    with torch.no_grad():
        found = store.get(key, lambda: measure(W, entry, tier, other))
    return _facts(entry, place, "", found, "equal" if found.equal else why)


def _counterpart(base: Source | None, entry: Entry, matched: Mapping[str, str]) -> tuple[str, torch.Tensor | None]:
    """Why there is nothing to compare with, or what there is."""
    if base is None:
        return "", None
    name = matched.get(entry.name)
    if name is None:
        return "the base has no such tensor", None
    other = next(e for e in base.entries if e.name == name)
    if other.shape != entry.shape:
        return f"the base has another shape, {list(other.shape)}", None
    if other.reason and not other.shared:
        return f"the base cannot be compared: {other.reason}", None
    return "", base.read(name)


def _facts(entry: Entry, place: Place, skipped: str, found: Measured | None = None, base: str = "") -> MatrixFacts:
    slices, out, columns = entry.matrices if not skipped else (1, 0, 0)
    found = found or Measured(findings={})
    return MatrixFacts(
        name=entry.name,
        shape=entry.shape,
        out_features=out,
        in_features=columns,
        slices=slices,
        dtype=entry.dtype,
        parameters=entry.parameters,
        bytes=entry.bytes,
        role=place.role,
        depth=place.depth,
        skipped=skipped,
        findings=found.findings,
        singular_values=found.singular_values,
        places=found.places,
        noise=found.noise,
        energy=found.energy,
        seconds=found.seconds,
        verdict=found.verdict,
        base=base,
        tied=entry.shared,
    )


def _title(label: str) -> str:
    """The last part of a path; of ``…/model`` and ``…/model.safetensors`` the one before it."""
    path = Path(label)
    parts = [part for part in (path.stem if path.suffix == ".safetensors" else path.name, path.parent.name) if part]
    return next((part for part in parts if part not in ("model", "weights")), label)


def _meta(
    source: Source, facts: Sequence[MatrixFacts], store: Cache, hashed: str, missing: Sequence[str]
) -> dict[str, Any]:
    measured = [f for f in facts if not f.skipped]
    meta: dict[str, Any] = {
        "file": source.label,
        "hash": hashed,
        "dtypes": sorted({f.dtype for f in measured}),
        "tensors": len(facts),
        "measured": len(measured),
        "bytes": sum(f.bytes for f in facts),
    }
    if store.folder is not None:
        meta["taken from the cache"] = store.found
    if missing:
        meta["only in the base"] = list(missing)
    if source.notes:
        meta["notes"] = list(source.notes)
    return meta
