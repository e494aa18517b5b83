"""``eckart.adapt``: fine-tune a model with few parameters, and say what it brought on examples it has not seen."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from eckart.adaptation import Spread, get_adaptation
from eckart.arch import check_finite, find_sites, fingerprint
from eckart.checkpoint import MANIFEST, Manifest, atomic_folder
from eckart.data.examples import Examples, Fields, read_examples
from eckart.errors import EckartWarning, InputError, MismatchError, NotFiniteError, problems
from eckart.evaluation.bootstrap import bootstrap, resample
from eckart.hf.adapter_trainer import collate, last_checkpoint, pad_token, row_losses, tokenise, train
from eckart.hf.adapters.config import AdapterConfig
from eckart.hf.adapters.export import FOLDER
from eckart.hf.adapters.targets import put_adapter, target_names
from eckart.hf.adapters.tuner import adapter_layers
from eckart.hf.classifier import load_classifier
from eckart.hf.models import LoadedModel
from eckart.moments import Moments
from eckart.records import Budget, Interval, Progress, Site, silent
from eckart.verbs.calibrate import calibrate_sites
from eckart.verbs.models import ModelLike, as_loaded
from eckart.verbs.plan import as_moments

DEFAULT_METHOD = "lora"
DEFAULT_LENGTH = 256
"""Tokens of an example at most, where the model takes so many."""
MOMENT_ROWS = 256
"""Training rows that the moments of the inputs come from, where none were given."""
RUN = "run.json"
"""In the work folder: what the run is, so that another one is not continued by mistake."""


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """One layer of the adapter."""

    name: str
    rank: int
    """0: the budget left it out."""
    parameters: int


@dataclass(frozen=True, kw_only=True)
class AdaptPlan:
    """What would be trained, before it is."""

    method: str
    layers: tuple[AdaptedLayer, ...]
    parameters: int
    """Numbers that the adapter trains; shared ones counted once."""
    whole: Mapping[str, int]
    """Modules that are trained whole, such as a new head, and their numbers."""
    model_parameters: int
    """Of the base model."""
    kind: str
    """Of the examples: running, text, completion or label."""
    rows: int
    """Training rows."""
    held_out: str
    """Which part the loss is measured on."""
    held_out_rows: int
    steps: int
    rate: float
    batch_size: int
    length: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Trained numbers of the adapter over those of the base model."""
        return self.parameters / max(1, self.model_parameters)


@dataclass(frozen=True, kw_only=True)
class AdaptOutcome:
    """What a training did."""

    plan: AdaptPlan
    before: Interval
    """Loss on the held-out part without the adapter: nats per token, or per example for classes."""
    after: Interval
    change: Interval
    """After − before, paired by row; below 0 where the adapter helps."""
    accuracy_before: Interval
    """Share of targets (tokens, classes) that were the most likely."""
    accuracy_after: Interval
    history: tuple[Mapping[str, float], ...]
    """Training loss by step."""
    resumed_from: int
    """Steps that an earlier, interrupted run had done."""
    seconds: float


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model with its trained adapter, and how it came about."""

    model: nn.Module
    """PEFT's model."""
    loaded: LoadedModel
    outcome: AdaptOutcome
    labels: tuple[str, ...]
    base_fingerprint: str
    data: Mapping[str, Any]
    work: Path | None

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False, command: str = "") -> Path:
        """Write the adapter, its plain-LoRA copy (``lora/``, where the method is one), ``eckart.json`` and a card.

        The folder appears whole or not at all; then the checkpoints of the work folder are removed. Raises FileError
        where it exists (without ``overwrite``) or cannot be written.
        """
        path = Path(directory)
        size = 8 * sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        with atomic_folder(path, overwrite=overwrite, needed=2 * size) as folder:
            model: Any = self.model
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*no plain-LoRA copy", EckartWarning)  # said below, with its place
                model.save_pretrained(folder)
            copied = (folder / FOLDER).is_dir()
            (folder / "README.md").write_text(self._card(path.name, copied), encoding="utf-8")
            Manifest(
                version=importlib.metadata.version("eckart"),
                base=self.loaded.name,
                fingerprint=self.base_fingerprint,
                command=command or "eckart.adapt(…) in Python",
                outcome={"adaptation": self.to_json()},
                calibration=dict(self.data),
            ).write(folder)
        if not copied:
            warnings.warn(
                f"{path} has no plain-LoRA copy, so it needs Eckart to be loaded: the method "
                f"{self.outcome.plan.method!r} is no LoRA. eckart convert makes one with a measured error.",
                EckartWarning,
                stacklevel=2,
            )
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        return path

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        content = dataclasses.asdict(self.outcome)
        content["plan"]["share"] = self.outcome.plan.share
        return {**content, "labels": list(self.labels)}

    def _card(self, name: str, copied: bool) -> str:
        outcome, plan = self.outcome, self.outcome.plan
        unit = outcome.after.unit
        base = self.loaded.name
        known = self.loaded.path is None
        head = "library_name: peft\ntags:\n- eckart" + (f"\nbase_model: {base}" if known else "")
        loading = (
            "from peft import PeftModel\n\nimport eckart\n\nmodel = PeftModel.from_pretrained(base, this_folder)\n"
        )
        lines = [
            f"---\n{head}\n---\n\n# {name}\n",
            f"An adapter for `{base}`, trained with the method `{plan.method}` of Eckart: {plan.parameters:,} numbers, "
            f"{plan.share:.2%} of the model's, in {sum(layer.rank > 0 for layer in plan.layers)} layers.\n",
            f"```python\n{loading}```\n",
        ]
        if copied:
            lines.append(f"`{FOLDER}/` holds the same adapter as plain LoRA, for PEFT without Eckart and for vLLM.\n")
        else:
            lines.append("This method is no LoRA: `eckart convert` approximates it with a measured error.\n")
        if self.labels:
            shown = ", ".join(f"{i} {label}" for i, label in enumerate(self.labels))
            lines.append(f"The base needs a head for {len(self.labels)} classes (`num_labels`): {shown}.\n")
        lines.append(
            f"| {plan.held_out} | before | after | change |\n|---|---|---|---|\n"
            f"| loss, {unit} | {_shown(outcome.before)} | {_shown(outcome.after)} | {_shown(outcome.change)} |\n"
            f"| accuracy | {_shown(outcome.accuracy_before)} | {_shown(outcome.accuracy_after)} | |\n\n"
            f"Means with 95 % intervals over {outcome.after.n} rows. Trained on {plan.rows} rows of "
            f"`{Path(str(self.data.get('data'))).name}` (sha256 {str(self.data.get('sha256'))[:12]}…): {plan.steps} "
            f"steps of {plan.batch_size}, learning rate {plan.rate:g}. `{MANIFEST}` has the rest.\n"
        )
        return "\n".join(lines)


def _shown(value: Interval) -> str:
    return f"{value.mean:.4f} ({value.low:.4f} to {value.high:.4f})"


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Everything up to the first step."""

    model: Any
    loaded: LoadedModel
    config: AdapterConfig
    plan: AdaptPlan
    rows: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    labels: tuple[str, ...]
    base_fingerprint: str
    data: Mapping[str, Any]
    signature: Mapping[str, Any]


def adapt_plan(model: ModelLike, data: str | os.PathLike[str], **keywords: Any) -> AdaptPlan:
    """What :func:`adapt` would train with the same arguments: ranks, numbers, rows and steps. Trains nothing.

    It loads the model and starts the adapter, so that what it says is what happens.
    """
    for name in ("work", "save_every"):
        keywords.pop(name, None)
    return _prepare(model, data, **keywords).plan


def adapt(
    model: ModelLike,
    data: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    budget: Budget | None = None,
    spread: Spread | None = None,
    targets: str | Sequence[str] = "all-linear",
    held_out: str | os.PathLike[str] | None = None,
    held_out_share: float = 0.1,
    fields: Fields | None = None,
    moments: Moments | str | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    rate: float = 5e-4,
    batch_size: int = 8,
    length: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    work: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: Progress = silent,
) -> Adapted:
    """Train an adapter on a file of examples, and measure it on examples that were held out.

    Args:
        model: folder or hub name; a causal language model, or for examples with labels any model that transformers can
            give a head for classes. A module in memory (with ``tokenizer``) is adapted in place.
        data: ``.jsonl`` with ``prompt`` and ``completion`` (trained on the completion), ``text`` and ``label``
            (classes), or ``text``; or ``.txt``, one running text in windows. ``fields`` renames those.
        method: a name of :data:`eckart.adaptation.ADAPTATIONS`, with ``options``.
        rank: of every layer; or ``budget``, such as ``Budget(model_keep=0.005)`` or ``Budget(parameters=100_000)``,
            with ``spread`` over the layers. Without either, the method's own rule.
        targets: names or ends of names of layers, a regular expression, or all-linear.
        held_out: another file that is measured on; without it ``held_out_share`` of the rows, drawn with ``seed``
            (of a running text its end).
        moments: of ``eckart.calibrate`` on the same model, for methods that start from inputs. Without them they are
            collected in one pass over at most 256 training rows.
        steps: of the optimiser; or ``epochs``.
        rate: highest learning rate. It matters more than the method: try some.
        work: folder for checkpoints every ``save_every`` steps. Called again with the same arguments, a run that was
            interrupted goes on from the last one. None: no checkpoints.

    Examples that are longer than ``length`` tokens (256, or what the model takes) are cut, and counted in the notes.

    Raises InputError that names every faulty line of the data and every wrong option before the model is loaded,
    NotFiniteError where the loss is not finite, KeyboardInterrupt after Ctrl-C, with a checkpoint in ``work``.
    """
    start = time.perf_counter()
    found = _prepare(
        model,
        data,
        tokenizer=tokenizer,
        method=method,
        options=options,
        rank=rank,
        budget=budget,
        spread=spread,
        targets=targets,
        held_out=held_out,
        held_out_share=held_out_share,
        fields=fields,
        moments=moments,
        epochs=epochs,
        steps=steps,
        rate=rate,
        batch_size=batch_size,
        length=length,
        seed=seed,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    pad = pad_token(found.loaded)
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing) if work is None else Path(work)
        resumed = _take_up(folder, found.signature)
        progress("measure", 0, 2)
        before = row_losses(found.model, found.held_out, pad, batch_size)
        history = train(
            found.model,
            found.rows,
            pad=pad,
            steps=found.plan.steps,
            rate=rate,
            batch_size=batch_size,
            seed=seed,
            work=folder,
            save_every=save_every if work is not None else found.plan.steps + 1,
            on_cpu=found.loaded.device.type == "cpu",
            progress=progress,
        )
        progress("measure", 1, 2)
        after = row_losses(found.model, found.held_out, pad, batch_size)
        progress("measure", 2, 2)
    if not bool(torch.isfinite(after[0]).all()):
        raise NotFiniteError("the loss on the held-out part is not finite after training; take a lower learning rate.")
    counts = resample(len(after[0]), seed=seed)
    unit = "nats per example" if found.plan.kind == "label" else "nats per token"
    tokens = after[1]
    return Adapted(
        model=found.model.eval(),
        loaded=found.loaded,
        outcome=AdaptOutcome(
            plan=found.plan,
            before=bootstrap(before[0], tokens, counts=counts, unit=unit),
            after=bootstrap(after[0], tokens, counts=counts, unit=unit),
            change=bootstrap(after[0] - before[0], tokens, counts=counts, unit=unit),
            accuracy_before=bootstrap(before[2], tokens, counts=counts),
            accuracy_after=bootstrap(after[2], tokens, counts=counts),
            history=tuple(history),
            resumed_from=resumed,
            seconds=time.perf_counter() - start,
        ),
        labels=found.labels,
        base_fingerprint=found.base_fingerprint,
        data=found.data,
        work=None if work is None else Path(work),
    )


def _prepare(
    model: ModelLike,
    data: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    budget: Budget | None = None,
    spread: Spread | None = None,
    targets: str | Sequence[str] = "all-linear",
    held_out: str | os.PathLike[str] | None = None,
    held_out_share: float = 0.1,
    fields: Fields | None = None,
    moments: Moments | str | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    rate: float = 5e-4,
    batch_size: int = 8,
    length: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> _Prepared:
    examples, other = _read(
        data,
        held_out,
        fields or Fields(),
        _option_faults(rank, budget, epochs, steps, rate, batch_size, length, seed, held_out_share),
    )
    config = AdapterConfig(
        method=method,
        r=rank,
        budget=None if budget is None else {budget.unit: getattr(budget, budget.unit)},
        spread=spread,
        options=dict(options or {}),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if examples.kind == "label" else "CAUSAL_LM",
        seed=seed,
        progress=progress,
    )
    known = as_moments(moments)
    loaded, new = _load(model, examples, tokenizer, seed, dtype, device)
    base = fingerprint(loaded.model)
    if known is not None and not new:
        known.check(base)
    limit = loaded.max_length or DEFAULT_LENGTH
    length = min(DEFAULT_LENGTH, limit) if length is None else length
    if loaded.max_length is not None and length > limit:
        raise InputError(f"length is at most {loaded.max_length}, which is what {loaded.name} takes; got {length}.")
    rows, cut, dropped = _tokens(loaded, examples, length)
    notes = [f"{cut} examples were cut to {length} tokens"] if cut else []
    notes += [f"{dropped} examples had nothing left to learn within {length} tokens"] if dropped else []
    train_rows, held_rows, words = _divide(loaded, examples, other, rows, length, held_out_share, seed)
    if new:
        config.modules_to_save = list(new)
        config.exclude_modules = rf"(.*\.)?({'|'.join(new)})(\..*)?"
    names = target_names(config, loaded.model)
    check_finite(loaded.model, [site for site in _sites(loaded.model) if site.name in names])
    if known is None and (get_adaptation(method).needs or spread in ("activation", "gradient")):
        known = _collect(loaded, examples, train_rows, names, batch_size, spread, seed, progress)
    config._moments = known
    model_parameters = sum(p.numel() for p in loaded.model.parameters())
    adapted: Any = put_adapter(loaded.model, config)
    layers = {layer.delta("default").layout.name: layer.delta("default") for _, layer in adapter_layers(adapted)}
    inside = {id(p): p.numel() for delta in layers.values() for p in delta.parameters()}
    if not inside:
        raise InputError(
            f"method {method!r} leaves nothing to train on these layers; give it a rank or a budget, or other layers."
        )
    total = math.ceil(len(train_rows) * epochs / batch_size) if steps is None else steps
    plan = AdaptPlan(
        method=config.method,
        layers=tuple(
            AdaptedLayer(name=n, rank=r, parameters=layers[n].parameter_count() if n in layers else 0)
            for n, r in config.ranks.items()
        ),
        parameters=sum(inside.values()),
        whole=_whole(adapted, inside),
        model_parameters=model_parameters,
        kind=examples.kind,
        rows=len(train_rows),
        held_out=words,
        held_out_rows=len(held_rows),
        steps=max(1, total),
        rate=rate,
        batch_size=batch_size,
        length=length,
        notes=tuple(notes),
    )
    described = {"data": examples.name, "sha256": examples.sha256, "kind": examples.kind, "held_out": words}
    signature = {
        "base": base if not new else loaded.name,
        "data": examples.sha256,
        "held_out": None if other is None else other.sha256,
        "config": {k: v for k, v in config.to_dict().items() if k not in ("base_model_name_or_path", "saved")},
        "plan": {name: getattr(plan, name) for name in ("rows", "steps", "rate", "batch_size", "length")},
        "seed": seed,
    }
    return _Prepared(
        model=adapted,
        loaded=loaded,
        config=config,
        plan=plan,
        rows=train_rows,
        held_out=held_rows,
        labels=examples.labels,
        base_fingerprint=base,
        data=described,
        signature=json.loads(json.dumps(signature)),
    )


def _option_faults(
    rank: int | None,
    budget: Budget | None,
    epochs: float,
    steps: int | None,
    rate: float,
    batch_size: int,
    length: int | None,
    seed: int,
    share: float,
) -> list[str]:
    found = []
    counts: dict[str, int | None] = {"batch_size": batch_size, "steps": steps, "rank": rank}
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            found.append(f"{name} is an int of at least 1; got {value!r}")
    if length is not None and (not isinstance(length, int) or length < 2):
        found.append(f"length is a number of tokens, at least 2; got {length!r}")
    if not 0 < epochs < math.inf:
        found.append(f"epochs is a number above 0; got {epochs!r}")
    if not 0 < rate < math.inf:
        found.append(f"rate is a learning rate above 0; got {rate!r}")
    if not isinstance(seed, int) or seed < 0:
        found.append(f"seed is an int of at least 0; got {seed!r}")
    if not 0 < share < 1:
        found.append(f"held_out_share is a share of the rows in (0, 1); got {share!r}")
    if rank is not None and budget is not None:
        found.append("rank and budget exclude each other: a budget gives every layer its rank")
    return found


def _read(
    data: str | os.PathLike[str], held_out: str | os.PathLike[str] | None, fields: Fields, faults: Sequence[str]
) -> tuple[Examples, Examples | None]:
    """Both files; raises InputError with what is wrong in either, and in the options."""
    found: list[Examples] = []
    wrong = list(faults)
    for path in (data, held_out):
        if path is None:
            continue
        try:
            found.append(read_examples(Path(path), fields))
        except InputError as error:
            wrong.append(str(error))
    if not wrong and len(found) == 2:
        first, second = found
        if first.kind != second.kind:
            wrong.append(f"{first.name} has examples of the kind {first.kind!r}, {second.name} of {second.kind!r}")
        elif strange := sorted(set(second.labels) - set(first.labels)):
            wrong.append(f"{second.name} has labels that are not trained: {', '.join(strange[:5])}")
    if wrong:
        raise InputError(wrong[0] if len(wrong) == 1 else problems("this cannot be trained", wrong))
    return found[0], found[1] if len(found) == 2 else None


def _load(
    model: ModelLike, examples: Examples, tokenizer: Any, seed: int, dtype: str | None, device: str | None
) -> tuple[LoadedModel, tuple[str, ...]]:
    """The model for these examples, and its modules that are new."""
    if examples.kind == "label" and isinstance(model, (str, os.PathLike)):
        loaded, new = load_classifier(str(model), examples.labels, seed=seed, dtype=dtype, device=device)
    else:
        loaded, new = as_loaded(model, tokenizer, dtype=dtype, device=device), ()
    if examples.kind == "label":
        classes = getattr(getattr(loaded.model, "config", None), "num_labels", None)
        if not type(loaded.model).__name__.endswith("ForSequenceClassification") or classes != len(examples.labels):
            raise InputError(
                f"{examples.name} has {len(examples.labels)} labels; expected a model for so many classes, got "
                f"{type(loaded.model).__name__} with {classes}. Give the folder, and a head is made."
            )
    elif loaded.task != "causal-lm":
        raise InputError(
            f"{examples.name} holds text to be continued, and {loaded.name} is no causal language model "
            f"({type(loaded.model).__name__}). Give examples with labels, or another model."
        )
    return loaded, new


def _tokens(loaded: LoadedModel, examples: Examples, length: int) -> tuple[Sequence[Mapping[str, Any]], int, int]:
    found = tokenise(loaded, examples, length)
    return found.rows, found.cut, found.dropped


def _divide(
    loaded: LoadedModel,
    examples: Examples,
    other: Examples | None,
    rows: Sequence[Mapping[str, Any]],
    length: int,
    share: float,
    seed: int,
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], str]:
    """Rows to train on, rows to measure on, and what those are."""
    if other is not None:
        if other.kind == "label":  # the classes are those of the training file
            other = dataclasses.replace(other, rows=(*other.rows, *(("", label) for label in examples.labels)))
            found = _tokens(loaded, other, length)[0][: -len(examples.labels)]
        else:
            found = _tokens(loaded, other, length)[0]
        return rows, found, f"the {len(found)} rows of {Path(other.name).name}"
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise InputError(
            f"{examples.name} has {len(rows)} rows of {length} tokens, too few to hold some out. Give more, a smaller "
            "length, or another file to measure on."
        )
    name = Path(examples.name).name
    if examples.kind == "running":
        return rows[:-count], rows[-count:], f"the last {count} of {len(rows)} windows of {name}"
    chosen = set(Random(seed).sample(range(len(rows)), count))
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [rows[i] for i in sorted(chosen)], f"{count} of {len(rows)} rows of {name}, drawn with seed {seed}"


def _sites(model: nn.Module) -> Sequence[Site]:
    return find_sites(model, embeddings=True, head=True)


def _collect(
    loaded: LoadedModel,
    examples: Examples,
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    batch_size: int,
    spread: Spread | None,
    seed: int,
    progress: Progress,
) -> Moments:
    """Moments of the adapted layers in one pass over some of the training rows."""
    if spread == "gradient" and examples.kind == "label":
        raise InputError("spread 'gradient' needs a loss of a language model; take weight or activation.")
    wanted = set(names)
    sites = [site for site in _sites(loaded.model) if {site.name, *site.tied} & wanted]
    some = rows[:MOMENT_ROWS]
    pad = pad_token(loaded)
    batches = []
    for start in range(0, len(some), batch_size):
        batch = collate(some[start : start + batch_size], pad)
        batches.append({k: v.to(loaded.device) for k, v in batch.items() if k != "labels"})
    return calibrate_sites(
        loaded, sites, batches, gradients="full" if spread == "gradient" else "none", seed=seed, progress=progress
    )


def _whole(adapted: nn.Module, inside: Mapping[int, int]) -> dict[str, int]:
    """Trained parameters outside of the adapters, by module."""
    found: dict[str, int] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            module = name.removeprefix("base_model.model.").partition(".modules_to_save")[0]
            found[module] = found.get(module, 0) + parameter.numel()
    return found


def _take_up(work: Path, signature: Mapping[str, Any]) -> int:
    """The steps that an interrupted run of the same settings has done; makes the folder.

    Raises MismatchError where an interrupted run of other settings lies there.
    """
    file = work / RUN
    if file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if there != signature and last_checkpoint(work) is not None:
            known = there if isinstance(there, dict) else {}
            other = [name for name in signature if known.get(name) != signature[name]]
            raise MismatchError(
                f"{work} holds an interrupted run with other settings ({', '.join(other)}). Call it with those to go "
                "on, or remove the folder."
            )
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(signature, indent=1), encoding="utf-8")
    last = last_checkpoint(work)
    return 0 if last is None else int(last.name.rpartition("-")[2])
