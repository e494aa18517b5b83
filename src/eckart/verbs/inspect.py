"""``eckart.inspect``: what a model, or a file of weights, holds."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eckart.arch import find_sites
from eckart.checkpoint.atomic import write_text
from eckart.errors import InputError, NotFiniteError, problems, unknown
from eckart.hf.models import LoadedModel
from eckart.inspection import WeightsLike, inspect_weights
from eckart.inspection.record import Inspection, Panel, Tier
from eckart.records import Progress, as_plain, silent
from eckart.report import inspection_note, render_inspection
from eckart.verbs.calibrate import calibrate_sites
from eckart.verbs.models import Batches, DataLike, ModelLike, as_batches, as_loaded
from eckart.verbs.panels import activation_panel, change_panel, curvature_panel, dimension_panel, losses_of, too_large

TIERS: dict[Tier, str] = {
    "quick": "norms, stable rank and tail exponents from windows",
    "standard": "exact spectra: ranks, noise, spikes, tails, defects",
    "full": "with data also the dimension of embeddings and the curvature of the loss",
}


WeightsSource = ModelLike | Mapping[str, Tensor]
"""What is looked at. To run it on data it must be a model, not a file or a mapping."""


class Inspected(Inspection):
    """An inspection that knows how to show itself."""

    def page(self) -> str:
        """The report as one HTML file that needs no network."""
        return render_inspection(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all. Raises FileError where that fails."""
        write_text(Path(path), self.page())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; numbers that are not finite become None."""
        plain: dict[str, Any] = as_plain(self)
        return plain

    def _repr_html_(self) -> str:
        return inspection_note(self)


def inspect(
    model: WeightsSource,
    data: DataLike | None = None,
    *,
    tier: Tier = "standard",
    against: WeightsSource | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    command: str = "",
    progress: Progress = silent,
) -> Inspected:
    """Measure every weight of a model: size, ranks, noise, tails, defects; what stands out, and what to do next.

    Args:
        model: a folder, a ``.safetensors`` file (no model class is needed for either), a hub name, a module, or a
            mapping of names to tensors.
        data: texts to run the model on, as for :func:`eckart.calibrate`; gives the rank of the activations by depth
            and, in the tier ``full``, the dimension of the embeddings or the curvature of the loss.
        tier: ``quick``, ``standard`` or ``full``.
        against: a model of the same shape; what changed against it is measured too.
        include: patterns of names of weights; ``exclude`` leaves some out.
        cache: a folder that keeps what was measured of each weight, by its hash.
        command: the command line, for the page.

    Weights are read one by one; none is left out in silence: what cannot be measured is listed with the reason.
    Cost in ``standard``: 6 s of one core for 4096 × 4096, 9 s for 4096 × 11008; calibration with ``data`` comes on top.

    Raises InputError for options and data that cannot be used, MismatchError for a base without
    a weight of the same name and shape (others are rows that say so), FileError for
    files that are missing, cut short or pickled.
    """
    _check(model, data, tier, samples, batch_size)
    loaded = None
    if data is not None:
        loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)  # type: ignore[arg-type]
    elif dtype is not None or device is not None or tokenizer is not None:
        raise InputError("tokenizer, dtype and device say how a model runs on data; without data it only is read.")
    found = inspect_weights(
        _weights_of(model, loaded),
        tier=tier,
        base=None if against is None else _weights_of(against),
        include=include,
        exclude=exclude,
        cache=cache,
        progress=progress,
    )
    if isinstance(model, str) and found.source != model and not Path(model).expanduser().exists():
        found = _named(found, model)
    panels = list(found.panels)
    if against is not None:
        panels += _kept([change_panel(found.matrices, "delta_relative", "‖ΔW‖ / ‖W‖")])
    notes: list[str] = []
    if data is not None and loaded is not None:
        batches, known = as_batches(
            loaded,
            data,
            part="calibration",
            field=field,
            samples=samples,
            length=length,
            batch_size=batch_size,
            seed=seed,
        )
        panels += _data_panels(loaded, batches, known, tier, seed, progress, notes)
    meta = dict(found.meta) | {
        "date": datetime.date.today().isoformat(),
        "version": importlib.metadata.version("eckart"),
        "command": command,
    }
    if notes:
        meta["not measured"] = notes
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return Inspected(**fields | {"panels": tuple(panels), "meta": meta})


def _check(model: WeightsSource, data: DataLike | None, tier: Tier, samples: int | None, batch_size: int) -> None:
    """Everything that can be refused before a weight is read, at once."""
    found = []
    if tier not in TIERS:
        found.append(unknown("tier", str(tier), TIERS))
    if data is not None and (isinstance(model, Mapping) or (_is_path(model) and Path(str(model)).is_file())):
        what = "a mapping of tensors" if isinstance(model, Mapping) else str(model)
        found.append(f"data can only be run through a model, and {what} is none; name its folder")
    if samples is not None and samples < 1:
        found.append(f"samples is at least 1; got {samples}")
    if batch_size < 1:
        found.append(f"batch_size is at least 1; got {batch_size}")
    if found:
        raise InputError(problems("inspect", found))


def _is_path(model: WeightsSource) -> bool:
    return isinstance(model, (str, os.PathLike))


def _weights_of(model: WeightsSource, loaded: LoadedModel | None = None) -> WeightsLike:
    """What :func:`eckart.inspection.inspect_weights` reads: what lies on disk as it lies there, else the module."""
    if isinstance(model, (str, os.PathLike)):
        path = Path(model).expanduser()
        if path.exists() or path.suffix == ".safetensors":
            return path
        return (loaded or as_loaded(model)).model
    return model.model if isinstance(model, LoadedModel) else model


def _named(found: Inspection, name: str) -> Inspection:
    """An inspection of a model that was loaded by its hub name, under that name instead of its class."""
    commands = tuple(
        dataclasses.replace(o, command=o.command.replace(f" {found.source} ", f" {name} ")) for o in found.observations
    )
    return dataclasses.replace(found, title=name.rpartition("/")[2], source=name, observations=commands)


def _data_panels(
    loaded: LoadedModel,
    batches: Batches,
    known: Mapping[str, Any],
    tier: Tier,
    seed: int,
    progress: Progress,
    notes: list[str],
) -> list[Panel]:
    """What running the model shows; ``notes`` takes what could not be measured, and why."""
    sites = find_sites(loaded.model)
    if not sites:
        notes.append("activations: the model has no linear maps that are known")
        return []
    try:
        moments = calibrate_sites(loaded, sites, batches, gradients="none", seed=seed, progress=progress)
    except NotFiniteError as error:
        notes.append(f"activations: {error}")
        return []
    moments.meta.update(known)
    panels = _kept([activation_panel(moments, sites)])
    if tier != "full":
        return panels
    if loaded.task == "embedding":
        panels.append(dimension_panel(loaded, batches))
    losses = losses_of(loaded, batches)
    if losses and (reason := too_large(loaded.model)):
        notes.append(f"curvature: {reason}")
    elif losses:
        progress("curvature", 0, 1)
        panels.append(curvature_panel(loaded.model, losses, seed))
        progress("curvature", 1, 1)
    else:
        notes.append(f"curvature: no loss is known for the task {loaded.task} without labels")
    return panels


def _kept(panels: Sequence[Panel | None]) -> list[Panel]:
    return [panel for panel in panels if panel is not None]
