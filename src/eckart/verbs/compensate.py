"""``eckart.compensate``: what a quantised, pruned or compressed model lost, given back as a LoRA."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.apply.error import weighted_square
from eckart.arch import fingerprint, get_module, site_matrices
from eckart.checkpoint import MANIFEST, Manifest, atomic_folder
from eckart.compensation import (
    CompensateMethod,
    Repair,
    compensation_options,
    dense_map,
    find_damage,
    get_compensation,
    spread_ranks,
)
from eckart.errors import InputError, MismatchError, problems
from eckart.forms import LowRank
from eckart.hf.lora import attach_lora, lora_config, write_lora
from eckart.hf.models import LoadedModel
from eckart.linalg import symmetric_root
from eckart.moments import Moments, SiteMoments
from eckart.records import Progress, Site, silent
from eckart.verbs.calibrate import calibrate_sites
from eckart.verbs.models import DataLike, ModelLike, as_loaded
from eckart.verbs.plan import as_moments

DEFAULT_METHOD = "kfac"
Inputs = Literal["base", "damaged"]


@dataclass(frozen=True, kw_only=True)
class LayerRepair:
    """What happened to one map. Errors are relative to the output of the original: tr(G ΔW Σ ΔWᵀ) / tr(G W Σ Wᵀ)."""

    site: Site
    rank: int
    """Directions that its repair uses; the file has the largest of all, filled up with zeros."""
    before: float
    """Relative error of the damaged map on the calibration data."""
    after: float
    """The same with the repair, as rounded."""
    loss_before: float | None = None
    """Predicted rise of the loss, in nats per token or whatever the loss is summed over; None without gradients."""
    loss_after: float | None = None

    @property
    def captured(self) -> float:
        """Share of the error that the repair takes away, 0 … 1; 0 where there was none."""
        return 1 - self.after / self.before if self.before > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class RepairOutcome:
    """What a compensation did, all of it."""

    layers: tuple[LayerRepair, ...]
    rank: int
    """r of the adapter."""
    parameters: int
    """Numbers that the repairs need."""
    stored: int
    """Numbers in the file: every map at rank r."""
    repaired: int
    """Parameters of the maps that are repaired, dense."""
    method: str
    inputs: Inputs
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def loss_before(self) -> float | None:
        """Predicted rise of the loss by the damage, summed over the maps; None without gradients."""
        return _sum(layer.loss_before for layer in self.layers)

    @property
    def loss_after(self) -> float | None:
        return _sum(layer.loss_after for layer in self.layers)


@dataclass(frozen=True, eq=False)
class Compensated:
    """The repair of a damaged model, and how it came about."""

    damaged: LoadedModel
    """As it was given; a repair changes nothing in it."""
    forms: Mapping[str, LowRank]
    """By name of the map: b a is added to its weight."""
    outcome: RepairOutcome
    place: str | None
    """Folder or hub name of the damaged model; None for one in memory."""
    base: str
    base_fingerprint: str
    calibration: Mapping[str, Any]
    """What the moments were collected on; empty where there were none."""

    def repaired(self) -> LoadedModel:
        """A copy of the damaged model with the adapter beside its maps: what PEFT makes of the saved folder."""
        model = attach_lora(copy.deepcopy(self.damaged.model), self._config(), self.forms)
        return dataclasses.replace(self.damaged, model=model, path=None)

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False, command: str = "") -> Path:
        """Write a PEFT LoRA, ``eckart.json`` and a card into a folder, whole or not at all.

        ``PeftModel.from_pretrained(damaged_model, directory)`` loads it. Raises FileError where the folder exists
        (without ``overwrite``), cannot be written, or the disk fills up.
        """
        path = Path(directory)
        manifest = Manifest(
            version=importlib.metadata.version("eckart"),
            base=self.base,
            fingerprint=self.base_fingerprint,
            command=command or "eckart.compensate(…) in Python",
            outcome={"compensation": self.to_json()},
            calibration=dict(self.calibration),
        )
        size = sum(form.nbytes for form in self.forms.values())
        needed = size * self.outcome.stored // max(1, self.outcome.parameters)
        with atomic_folder(path, overwrite=overwrite, needed=needed) as folder:
            write_lora(folder, self._config(), self.forms)
            (folder / "README.md").write_text(self._card(), encoding="utf-8")
            manifest.write(folder)
        return path

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        outcome = self.outcome
        layers = [
            {
                "name": layer.site.name,
                "rank": layer.rank,
                "before": layer.before,
                "after": layer.after,
                "captured": layer.captured,
                "loss_before": layer.loss_before,
                "loss_after": layer.loss_after,
            }
            for layer in outcome.layers
        ]
        names = ("rank", "parameters", "stored", "repaired", "method", "inputs", "seconds", "loss_before", "loss_after")
        return {
            "damaged": self.place,
            **{name: getattr(outcome, name) for name in names},
            "notes": list(outcome.notes),
            "layers": layers,
        }

    def _config(self) -> Any:
        kinds = {layer.site.kind for layer in self.outcome.layers if layer.rank}
        return lora_config(self.forms, task=self.damaged.task, base=self.place, transposed="conv1d" in kinds)

    def _card(self) -> str:
        outcome, name = self.outcome, self.place or self.damaged.name
        head = "library_name: peft" + (f"\nbase_model: {self.place}" if self.place else "")
        return (
            f"---\n{head}\n---\n\n"
            f"# Repair of {Path(name).name}\n\n"
            f"Gives back part of what `{name}` lost against `{self.base}`: a LoRA of rank {outcome.rank} "
            f"beside {len(self.forms)} maps, found by the method `{outcome.method}` of Eckart, without training.\n\n"
            "```python\nfrom peft import PeftModel\n\n"
            "model = PeftModel.from_pretrained(damaged_model, this_folder)\n```\n\n"
            "Where the damaged model has layers of Eckart, `import eckart` first. Do not merge it into quantised or "
            f"pruned weights: that would round or fill them again. `{MANIFEST}` has the errors of every map.\n"
        )


def compensate(
    damaged: ModelLike,
    base: ModelLike,
    *,
    tokenizer: Any = None,
    data: DataLike | None = None,
    moments: Moments | str | None = None,
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    rank: int = 32,
    share: float | None = None,
    inputs: Inputs = "base",
    part: str = "calibration",
    field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Compensated:
    """Repair the linear maps of a quantised, pruned or compressed model by low rank, without training.

    Args:
        damaged: folder, hub name or module: masked or rounded weights in plain layers, torchao tensors, layers of
            Eckart. Its embeddings, convolutions and fused experts stay as they are.
        base: the model that it was made from, in its original precision.
        data: see :func:`eckart.calibrate`; or ``moments`` of the base. Method ``svd`` needs neither.
        method: ``kfac`` (least rise of the loss), ``eora`` or ``qera`` (least output error), ``svd`` (no data).
        rank: of the adapter: that of every map, or with ``share`` the most that a map may get. Maps of lower full
            rank get that.
        share: parameters of all repairs as a share of those of the repaired maps, spread by predicted loss; needs
            ``kfac``. The file holds every repair at the largest rank, filled up with zeros: engines want one.
        inputs: on which inputs repairs are fitted, the ``base`` model's or the ``damaged`` one's own.

    Where a bias was changed to make up for the mean (Eckart's own methods do), the repair is fitted to what that bias
    leaves: E x − d becomes (E − d μᵀ Σ⁺) x, its best linear form. Method ``svd`` without data does not see it.

    On the small causal model of benchmarks/compensate.py (width 128), ``inputs="base"`` was as good or better: bits
    per byte lost after repairs of rank 32 by ``kfac``, base and damaged inputs, were .0027 and .0027 at 4 bits (.0222
    before), .0154 and .0187 with half of the weights pruned (.181), .033 and .042 at 2:4 (.397). Mind the size:
    there rank 32 is 41 % of the parameters of the maps; rank 8 is a tenth, and 63 % came back at 4 bits.

    Raises InputError with everything that is wrong before any long work, MismatchError where ``damaged`` was not made
    from ``base``, BudgetError for a share that holds no direction, NotFiniteError.
    """
    start = time.perf_counter()
    chosen = get_compensation(method)
    chosen_options = compensation_options(chosen, options)
    _check(chosen, data, moments, rank, share, inputs)
    known = as_moments(moments)

    original = as_loaded(base, tokenizer, dtype=dtype, device=device)
    ours = as_loaded(damaged, tokenizer, dtype=dtype, device=device)
    base_print = fingerprint(original.model)
    _check_origin(ours, base_print)
    if known is not None:
        known.check(base_print)
    damage = find_damage(original.model, ours.model)
    largest = max(site.full_rank for site in damage.sites)
    if share is None and rank > largest:
        raise InputError(f"rank is at most {largest}, the full rank of the largest damaged map; got {rank}.")
    if data is not None:
        measured = original if inputs == "base" else _twin(original, ours, damage.sites)
        known = calibrate_sites(
            measured,
            damage.sites,
            data,
            part=part,
            field=field,
            samples=samples,
            length=length,
            batch_size=batch_size,
            gradients="full" if "gradient" in chosen.needs else "none",
            seed=seed,
            progress=progress,
        )
    sites, notes = _reached(damage.sites, known)
    repairs: dict[str, Repair] = {}
    for done, site in enumerate(sites):
        progress("compensate", done, len(sites))
        one = _Map.of(site, original.model, ours.model, known)
        repairs[site.name] = chosen.repair(one.weight, one.approximation, one.moments, chosen_options, rank)
    progress("compensate", len(sites), len(sites))
    ranks = _ranks(repairs, known, sites, rank, share)
    forms = {name: repairs[name].cut(k) for name, k in ranks.items() if k}
    layers = tuple(
        _Map.of(site, original.model, ours.model, known).outcome(site, forms.get(site.name)) for site in sites
    )
    uniform = max(form.rank for form in forms.values())
    return Compensated(
        damaged=ours,
        forms=forms,
        outcome=RepairOutcome(
            layers=layers,
            rank=uniform,
            parameters=sum(form.numel for form in forms.values()),
            stored=sum(uniform * sum(form.shape) for form in forms.values()),
            repaired=sum(site.weight_parameters for site in sites),
            method=chosen.name,
            inputs=inputs,
            seconds=time.perf_counter() - start,
            notes=(*damage.notes, *notes),
        ),
        place=str(ours.path or damaged) if isinstance(damaged, (str, os.PathLike)) or ours.path else None,
        base=original.name,
        base_fingerprint=base_print,
        calibration={} if known is None else known.meta,
    )


@dataclass(frozen=True, eq=False)
class _Map:
    """One damaged map beside its original."""

    weight: Tensor
    """W (out, in)."""
    approximation: Tensor
    """Ŵ, with the linear part of a changed bias."""
    moments: SiteMoments | None
    damaged: Tensor
    """Ŵ (out, in) as it is."""
    shift: Tensor | None
    """(out,): b̂ − b in float64, None where the bias is the same."""

    @classmethod
    def of(cls, site: Site, base: nn.Module, model: nn.Module, known: Moments | None) -> _Map:
        original = site_matrices(base, site)[0]
        weight = original["weight"]
        damaged, bias = dense_map(get_module(model, site.name), site)
        moments = None if known is None else known.site(site.name)
        shift = _shift(original.get("bias"), bias)
        approximation = damaged
        if shift is not None and moments is not None and moments.second is not None and moments.mean is not None:
            _, inverse = symmetric_root(moments.second)
            approximation = _exact(damaged) + shift.outer(inverse @ (inverse @ moments.mean))
        return cls(weight, approximation, moments, damaged, shift)

    def outcome(self, site: Site, form: LowRank | None) -> LayerRepair:
        """Errors of the damaged map and of the repaired one, changed bias included."""
        metric = self.moments or SiteMoments(count=0)
        delta = _exact(self.weight) - _exact(self.damaged)
        left = delta if form is None else delta - _exact(form.b) @ _exact(form.a)
        total = weighted_square(_exact(self.weight), metric, centred=False)
        before, after = (self._error(each, metric) for each in (delta, left))
        scale = metric.loss_scale if metric.gradient is not None else None
        return LayerRepair(
            site=site,
            rank=0 if form is None else form.rank,
            before=before / total if total else 0.0,
            after=after / total if total else 0.0,
            loss_before=None if scale is None else scale * before,
            loss_after=None if scale is None else scale * after,
        )

    def _error(self, delta: Tensor, metric: SiteMoments) -> float:
        """tr(G Δ Σ Δᵀ); with a changed bias Δ is [Δ, −d] on the inputs [x; 1]."""
        if self.shift is None or metric.second is None or metric.mean is None:
            return weighted_square(delta, metric, centred=False)
        mean = metric.mean.unsqueeze(1)
        second = torch.cat([torch.cat([metric.second, mean], 1), torch.cat([mean.T, mean.new_ones(1, 1)], 1)])
        widened = torch.cat([delta, -self.shift.unsqueeze(1)], dim=1)
        return weighted_square(widened, dataclasses.replace(metric, second=second), centred=False)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _sum(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) if found else None


def _shift(original: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """b̂ − b, None where they are equal; a bias that is not there is zero."""
    there = [_exact(each) for each in (original, bias) if each is not None]
    if not there:
        return None
    zero = torch.zeros_like(there[0])
    shift = (zero if bias is None else _exact(bias)) - (zero if original is None else _exact(original))
    return shift if bool(shift.any()) else None


def _check(
    method: CompensateMethod,
    data: DataLike | None,
    moments: Moments | str | None,
    rank: int,
    share: float | None,
    inputs: str,
) -> None:
    """Everything that can be seen without a model."""
    found = []
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        found.append(f"rank counts directions, an int of at least 1; got {rank!r}.")
    if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
        found.append(f"share is a share of the repaired maps' parameters in (0, 1]; got {share!r}.")
    if share is not None and not method.loss_units:
        found.append(f"share needs errors in units of the loss, which {method.name!r} has not; use kfac, or a rank.")
    if inputs not in ("base", "damaged"):
        found.append(f"inputs is 'base' or 'damaged'; got {inputs!r}.")
    if data is not None and moments is not None:
        found.append("data and moments exclude each other: moments are what calibrating on data gave.")
    if data is None and moments is None and method.needs:
        found.append(f"method {method.name!r} needs data or moments; only svd goes without.")
    if inputs == "damaged" and data is None:
        found.append("the damaged model's own inputs need data to run it on; moments are those of the base.")
    if found:
        raise InputError(problems("this cannot be compensated", found))


def _check_origin(damaged: LoadedModel, base_print: str) -> None:
    """Raises MismatchError where the folder of the damaged model names another original."""
    if damaged.path is None or not (damaged.path / MANIFEST).is_file():
        return
    manifest = Manifest.read(damaged.path)
    if manifest.fingerprint != base_print:
        raise MismatchError(
            f"{damaged.name} was made from {manifest.base} (fingerprint {manifest.fingerprint[:12]}…), but the base "
            f"has {base_print[:12]}…. Give the original in the precision that it was compressed in."
        )


def _twin(base: LoadedModel, damaged: LoadedModel, sites: Sequence[Site]) -> LoadedModel:
    """The base with the damaged weights in plain layers; tables that are stored in another way stay the base's."""
    model = copy.deepcopy(base.model)
    there = dict(damaged.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            other = there.get(name)
            if type(other) is nn.Parameter and other.shape == parameter.shape:
                parameter.copy_(other)
    for site in sites:
        weight, bias = dense_map(get_module(damaged.model, site.name), site)
        own = site_matrices(model, site)[0]
        own["weight"].copy_(weight)
        if "bias" in own and bias is not None:
            own["bias"].copy_(bias)
    return dataclasses.replace(base, model=model, path=None)


def _reached(sites: Sequence[Site], known: Moments | None) -> tuple[list[Site], list[str]]:
    """The sites that have moments, and a note on those that no token reached."""
    if known is None:
        return list(sites), []
    there, unreached = set(known.names()), set(known.meta.get("unreached", []))
    missing = [site.name for site in sites if site.name not in there | unreached]
    if missing:
        raise InputError(
            f"the moments lack {len(missing)} damaged maps, as {missing[0]}. Calibrate with head=True or without "
            "patterns, or give data."
        )
    lost = [site.name for site in sites if site.name not in there]
    if len(lost) == len(sites):
        raise InputError("no calibration token reached a damaged map; use other data.")
    return (
        [site for site in sites if site.name in there],
        [f"no token reached {name}, which stays as it is" for name in lost],
    )


def _ranks(
    repairs: Mapping[str, Repair], known: Moments | None, sites: Sequence[Site], rank: int, share: float | None
) -> dict[str, int]:
    if share is None or known is None:
        return {name: repair.form.rank for name, repair in repairs.items()}
    return spread_ranks(
        {name: (known.site(name).loss_scale * repair.errors).tolist() for name, repair in repairs.items()},
        {site.name: site.out_features + site.in_features for site in sites},
        int(share * sum(site.weight_parameters for site in sites)),
        rank,
    )
