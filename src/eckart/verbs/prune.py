"""``eckart.prune_model``: weights, neurons or heads that are not needed are taken out of a model, without training."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eckart.apply.crew import wait
from eckart.arch import find_sites, fingerprint, model_size, site_size, stored_weight
from eckart.checkpoint import MANIFEST, Manifest, atomic_folder
from eckart.errors import InputError, problems
from eckart.forms import LowRank
from eckart.hf.lora import attach_lora, lora_config, write_lora
from eckart.hf.models import LoadedModel
from eckart.hf.native import native_config
from eckart.hf.sentence import copy_sentence_files
from eckart.moments import Moments
from eckart.moments.distributed import join
from eckart.prune.masks import MaskSet
from eckart.prune.one_shot import OneShotAllocation, OneShotMethod, PruneOutcome, default_method, one_shot
from eckart.prune.patterns import parse_pattern
from eckart.prune.widths import WidthKind, kept_width, width_units
from eckart.records import LayerOutcome, Outcome, Progress, Size, silent
from eckart.report import outcome_to_json, render_report
from eckart.verbs.calibrate import calibrate_sites
from eckart.verbs.compress import Compressed, compress
from eckart.verbs.models import DataLike, ModelLike, as_loaded
from eckart.verbs.plan import as_moments
from eckart.verbs.save import save

WIDTHS: tuple[WidthKind, ...] = ("neurons", "heads")
MASKS = "masks.safetensors"
REPAIR = "repair"
"""Folder of the LoRA inside of the folder of a model."""
What = Literal["zeros", "zeros and rank", "width"]
WHAT: Mapping[What, str] = {
    "zeros": "zeros: for size on disk and as a start for sparse training; the folder is dense and as large as before, "
    "and nothing is faster",
    "zeros and rank": "zeros with a product of low rank beside: closer to the original than zeros alone; the folder is "
    "dense and as large as before, the product comes on top, and nothing is faster",
    "width": "width: smaller dense maps, so fewer bytes, fewer multiply-adds and less time, which `eckart evaluate` "
    "measures",
}
"""What a result buys: size on disk, rank or width."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned model and how it came about."""

    loaded: LoadedModel
    """The pruned model with its tokenizer: plain dense layers with zeros, or narrower ones."""
    what: What
    outcome: Outcome
    """Of zeros, ``after`` counts parameters that are not zero, and bytes and multiply-adds as the dense layers have."""
    settings: Mapping[str, Any]
    """Pattern, share and the rest of what was asked."""
    base_fingerprint: str
    calibration: Mapping[str, Any]
    masks: MaskSet | None = None
    """None for widths."""
    zeros: PruneOutcome | None = None
    """The sizes of zeros in every way of storing them, and every map; None for widths."""
    narrow: Compressed | None = None
    """Plan and outcome of widths."""
    native: tuple[str, ...] = ()
    """Why a narrower model needs ``import eckart`` to load; empty where its config says all."""

    @property
    def model(self) -> Any:
        """The pruned module."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def factors(self) -> Mapping[str, LowRank]:
        """By map: b a beside its sparse weight."""
        return {} if self.zeros is None else self.zeros.factors

    def repaired(self) -> LoadedModel:
        """A copy with the products beside their maps, as PEFT makes it of the saved folder. InputError without any."""
        model = attach_lora(copy.deepcopy(self.model), self._config(), self.factors)
        return dataclasses.replace(self.loaded, model=model, path=None)

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        head = {"what": self.what, "means": WHAT[self.what], **self.settings}
        if self.zeros is not None:
            return head | self.zeros.to_json()
        return head | {"native": not self.native, "notes": list(self.outcome.notes)} | outcome_to_json(self.outcome)

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_shard_size: str = "5GB",
        command: str = "",
    ) -> Path:
        """Write the model into a folder, whole or not at all, with a report, a model card and ``eckart.json``.

        Zeros: plain dense weights for ``AutoModel.from_pretrained``, ``masks.safetensors`` beside them
        (``MaskSet.load`` reads it), and with a rank a LoRA for PEFT in the folder ``repair``. Widths: as
        ``eckart.save``; a plain checkpoint with a smaller config where the family has one. Raises FileError where the
        folder exists (without ``overwrite``), cannot be written, or the disk fills up.
        """
        command = command or "eckart.prune_model(…) in Python"
        how: dict[str, Any] = {"overwrite": overwrite, "max_shard_size": max_shard_size}
        if self.narrow is not None:
            return save(self.narrow, directory, command=command, **how)
        path = Path(directory)
        if join()[0] == 0:  # of several processes that pruned together one writes
            self._write(path, command, overwrite, max_shard_size)
        wait(f"write {path}")
        return path

    def _write(self, path: Path, command: str, overwrite: bool, max_shard_size: str) -> None:
        needed = model_size(self.model).bytes + sum(form.nbytes for form in self.factors.values())
        with atomic_folder(path, overwrite=overwrite, needed=needed) as folder:
            self.model.save_pretrained(folder, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            copy_sentence_files(self.loaded.name, folder)
            if self.masks is not None:
                self.masks.save(folder / MASKS, self.model)
            if self.factors:
                (folder / REPAIR).mkdir()
                write_lora(folder / REPAIR, self._config(), self.factors)
            self._papers(folder, command)

    def _config(self) -> Any:
        layers = () if self.zeros is None else self.zeros.layers
        conv1d = any(layer.site.kind == "conv1d" for layer in layers if layer.rank)
        return lora_config(self.factors, task=self.loaded.task, transposed=conv1d)

    def _papers(self, folder: Path, command: str) -> None:
        version, title = importlib.metadata.version("eckart"), Path(self.loaded.name).name
        page = render_report(
            self.outcome,
            plan_json=json.dumps({**self.settings, "what": self.what}, indent=2),
            title=title,
            command=command,
            meta={
                "original": title,
                "fingerprint": self.base_fingerprint[:16],
                "calibrated on": str(self.calibration.get("data", "nothing")),
                "Eckart": version,
                "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
        )
        (folder / "report.html").write_text(page, encoding="utf-8")
        (folder / "README.md").write_text(self._card(command), encoding="utf-8")
        Manifest(
            version=version,
            base=self.loaded.name,
            fingerprint=self.base_fingerprint,
            command=command,
            outcome={"pruning": self.to_json()},
            calibration=dict(self.calibration),
        ).write(folder)

    def _card(self, command: str) -> str:
        zeros, title = self.zeros, Path(self.loaded.name).name
        if zeros is None:
            return ""
        rank = (
            "\nA LoRA in `repair` gives part back; add it, and do not merge it, which would fill the zeros:\n\n"
            "```python\nfrom peft import PeftModel\n\n"
            f'model = PeftModel.from_pretrained(model, "path/to/this/folder/{REPAIR}")\n```\n'
            if self.factors
            else ""
        )
        loss = "" if zeros.loss is None else f" The loss was predicted to rise by {zeros.loss:.3g}."
        return (
            "---\nlibrary_name: transformers\ntags:\n- eckart\n- pruned\n---\n\n"
            f"# {title}, pruned\n\n"
            f"{1 - zeros.keep:.1%} of the {zeros.weights:,} weights of {len(zeros.layers)} maps of `{title}` are zero "
            f"(pattern {zeros.pattern}, method `{zeros.method}`{', refitted' if zeros.refitted else ''}).{loss} "
            "Quality was not measured: run `eckart evaluate` against the original.\n\n"
            f"This is {WHAT[self.what]}.\n\n"
            "| weights of the pruned maps | bytes |\n|---|---:|\n"
            f"| before | {zeros.dense_bytes:,} |\n"
            f"| in this folder | {zeros.loadable_bytes:,} |\n"
            f"| as one bit per weight and the values that stay | {zeros.stored_bytes:,} |\n\n"
            "```python\nfrom transformers import AutoModel\n\n"
            'model = AutoModel.from_pretrained("path/to/this/folder")\n```\n\n'
            f"`{MASKS}` has the masks, which `eckart.prune.MaskSet.load` reads and any optimizer can keep "
            f"(`eckart.prune.keep_zero`).\n{rank}\n"
            f"Made with:\n\n```bash\n{command}\n```\n\n"
            f"`{MANIFEST}` has the share and the error of every map; `report.html` shows them.\n"
        )


def prune_model(
    model: ModelLike,
    *,
    tokenizer: Any = None,
    data: DataLike | None = None,
    moments: Moments | str | None = None,
    keep: float | None = None,
    pattern: str = "unstructured",
    method: OneShotMethod | None = None,
    refit: bool = True,
    allocation: OneShotAllocation | None = None,
    rank: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    part: str = "calibration",
    field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    inplace: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """Take a share of the weights, neurons or heads out of a model, and fit what stays to what was there.

    Args:
        model: folder, hub name or module (with ``tokenizer``). A module stays as it is unless ``inplace``.
        data: see :func:`eckart.calibrate`; or ``moments``. ``magnitude`` with ``refit=False`` needs neither.
        keep: share that stays, in (0, 1), met from below: of the weights, or of every MLP's neurons or every
            attention's heads. "keep n of m" says it by itself.
        pattern: ``unstructured``, ``row``, ``2:4``, ``keep 2 of 8``, … (:func:`eckart.prune.parse_pattern`): zeros in
            plain dense weights. ``neurons`` or ``heads``: narrower blocks, equal in all layers; a head of keys and
            values leaves with the queries that read it.
        method: for zeros, see :func:`eckart.prune.one_shot`. Neurons and heads are always scored by optimal brain
            surgery in units of the loss.
        refit: least squares on what stays, from the same moments.
        allocation: for zeros: how the share is spread over the layers.
        rank: for zeros: of a product beside every map, saved as a LoRA.

    Raises InputError with everything that is wrong before any long work, BudgetError where nothing would stay,
    MismatchError for moments of another model, NotFiniteError.
    """
    kind = next((width for width in WIDTHS if width == pattern), None)
    found = _problems(data, moments, keep, pattern, kind, method, allocation, rank)
    if found:
        raise InputError(problems("this cannot be pruned", found))
    settings = {"pattern": pattern, "keep": keep, "refit": refit}
    calibration: dict[str, Any] = {
        "part": part, "field": field, "samples": samples, "length": length, "batch_size": batch_size, "seed": seed,
        "progress": progress,
    }  # fmt: skip
    loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)
    if not isinstance(model, (str, os.PathLike)) and not inplace:
        loaded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    if kind is not None and keep is not None:
        return _narrower(loaded, kind, keep, refit, as_moments(moments), data, include, exclude, calibration, settings)
    rule = parse_pattern(pattern)
    chosen = method or default_method(rule)
    base_print = fingerprint(loaded.model)
    known = as_moments(moments)
    if data is not None:
        sites = find_sites(loaded.model, include=include, exclude=exclude)
        gradients: Literal["full", "none"] = "full" if chosen == "kfac" or allocation == "loss" or refit else "none"
        known = calibrate_sites(loaded, sites, data, gradients=gradients, **calibration)
    before = model_size(loaded.model)
    masks, zeros = one_shot(
        loaded.model,
        known,
        keep=keep,
        pattern=rule,
        method=chosen,
        refit=refit,
        allocation=allocation,
        rank=rank,
        include=include,
        exclude=exclude,
        progress=progress,
    )
    return Pruned(
        loaded=dataclasses.replace(loaded, path=None),
        what="zeros and rank" if zeros.factors else "zeros",
        outcome=_as_outcome(loaded, zeros, before, rank),
        settings={**settings, "rank": rank},
        base_fingerprint=base_print,
        calibration={} if known is None else known.meta,
        masks=masks,
        zeros=zeros,
    )


def _problems(
    data: DataLike | None,
    moments: Moments | str | None,
    keep: float | None,
    pattern: str,
    kind: WidthKind | None,
    method: str | None,
    allocation: str | None,
    rank: int,
) -> list[str]:
    """Everything that can be seen without a model; :func:`one_shot` sees to what is about zeros alone."""
    found = []
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1):
        found.append(f"keep is a share between 0 and 1, 1 would remove nothing; got {keep!r}")
    if data is not None and moments is not None:
        found.append("data and moments exclude each other: moments are what calibrating on data gave")
    if kind is None:
        try:
            parse_pattern(pattern)
        except InputError as error:
            found.append(f"{str(error).rstrip('.')}, {', '.join(WIDTHS)}")
    else:
        given = [name for name, value in (("method", method), ("allocation", allocation), ("rank", rank)) if value]
        if given:
            found.append(f"{' and '.join(given)} are for zeros; {kind} are scored in one way, equal in all layers")
        if keep is None:
            found.append(f"keep is missing: the share of the {kind} that stay")
        if data is None and moments is None:
            found.append(f"pattern {kind!r} needs data or moments")
    return found


def _narrower(
    loaded: LoadedModel,
    kind: WidthKind,
    keep: float,
    refit: bool,
    moments: Moments | None,
    data: DataLike | None,
    include: Sequence[str],
    exclude: Sequence[str],
    calibration: dict[str, Any],
    settings: Mapping[str, Any],
) -> Pruned:
    """Equal widths, by way of :func:`eckart.compress` on the maps of the units alone."""
    units, sites = width_units(loaded.model, kind, include, exclude)
    for unit in units:
        kept_width(unit, keep)
    made = compress(
        loaded,
        data=data,
        moments=moments,
        method="modules",
        options={"parts": [kind], "refit": refit},
        keep=keep,
        allocation="uniform",
        include=list(sites),
        inplace=True,
        **calibration,
    )
    config, reasons = native_config(made.model)
    notes = [WHAT["width"]]
    if config is None:
        notes.append(
            f"the config of {type(made.model).__name__} has no such width ({(reasons or ('',))[0]}), so the folder "
            "loads after `import eckart`"
        )
    made = dataclasses.replace(made, outcome=dataclasses.replace(made.outcome, notes=(*made.outcome.notes, *notes)))
    return Pruned(
        loaded=made.loaded,
        what="width",
        outcome=made.outcome,
        settings=settings,
        base_fingerprint=made.base_fingerprint,
        calibration=made.calibration,
        narrow=made,
        native=reasons or (),
    )


def _as_outcome(loaded: LoadedModel, zeros: PruneOutcome, before: Size, rank: int) -> Outcome:
    """For the report: parameters that are not zero, bytes and multiply-adds of what is there, products included."""
    layers = []
    for layer in zeros.layers:
        size = site_size(layer.site, stored_weight(loaded.model, layer.site).element_size())
        form = zeros.factors.get(layer.site.name)
        beside = Size(
            parameters=form.numel if form else 0, bytes=form.nbytes if form else 0, macs=form.macs if form else 0
        )
        left = Size(parameters=layer.kept, bytes=size.bytes, macs=size.macs)
        layers.append(
            LayerOutcome(
                site=layer.site,
                form="sparse",
                rank=layer.kept // (layer.site.slices * layer.site.out_features),
                before=size,
                after=left + beside,
                predicted=0.0 if layer.error is None else layer.error,
                loss=layer.loss,
                repair=layer.rank,
            )
        )
    nothing = Size(parameters=0, bytes=0, macs=0)
    sites_before = sum((layer.before for layer in layers), nothing)
    sites_after = sum((layer.after for layer in layers), nothing)
    return Outcome(
        layers=tuple(layers),
        sites_before=sites_before,
        sites_after=sites_after,
        model_before=before,
        model_after=Size(
            parameters=before.parameters - sites_before.parameters + sites_after.parameters,
            bytes=before.bytes - sites_before.bytes + sites_after.bytes,
            macs=before.macs - sites_before.macs + sites_after.macs,
        ),
        predicted_loss=zeros.loss,
        method=zeros.method,
        budget=f"keep {zeros.keep:.4g} (pattern {zeros.pattern})",
        seconds=zeros.seconds,
        notes=(
            WHAT["zeros and rank" if zeros.factors else "zeros"],
            f"parameters count what is not zero; as one bit per weight and the values that stay, the {len(layers)} "
            f"maps would take {zeros.stored_bytes:,} bytes instead of {zeros.dense_bytes:,}",
            *zeros.notes[1:],
        ),
    )
