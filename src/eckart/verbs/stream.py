"""``eckart.compress_stream``: models larger than memory, block by block, from folder to folder."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.apply.decide import rest_of
from eckart.apply.prepare import misfits
from eckart.arch import check_finite, find_sites, fingerprint
from eckart.checkpoint import check_output, claim_output, recover
from eckart.checkpoint.atomic import disk_full, put_in_place, set_aside, work_folder
from eckart.compression import CompressMethod, options_for
from eckart.errors import EckartWarning, FileError, InputError, problems
from eckart.hf.mapped import copy_companions, factored_like, parse_size, sources
from eckart.hf.models import load_model
from eckart.hf.sentence import copy_sentence_files
from eckart.hf.tasks import loss_for
from eckart.layers import describe
from eckart.modules import ModuleMethod, UnitFacts
from eckart.moments import Batch
from eckart.moments.tokens import BatchTokens
from eckart.planning import Allocation, Plan
from eckart.records import Budget, FormKind, Outcome, Progress, Site, Unit, silent
from eckart.streaming import (
    FORMS,
    Measure,
    Route,
    Wanted,
    equal_widths,
    foreseen_bytes,
    open_journal,
    scratch_bytes,
    stream,
)
from eckart.streaming.plan import Chosen
from eckart.verbs.calibrate import DEFAULT_PROBES, Gradients
from eckart.verbs.models import DataLike, as_batches
from eckart.verbs.papers import write_papers
from eckart.verbs.plan import DEFAULT_METHOD, any_method, bits_from, budget_from

BEGUN, SWAPPED = "begun", "swapped"
"""Units without files: what the first process knew, and that the result may lie in its place already."""
SPARE_BYTES = 1 << 20
"""For config, tokenizer and report."""


@dataclass(frozen=True, kw_only=True)
class CompressedStream:
    """A compressed model in its folder, and how it came about."""

    folder: Path
    plan: Plan
    outcome: Outcome
    resumed: bool
    """Whether an earlier process had begun it."""
    bookkeeping_seconds: float
    """Spent by this process on what only resuming needs: journal lines, checksums of files."""


def compress_stream(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    data: DataLike | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    keep: float | None = None,
    budget: Budget | None = None,
    allocation: Allocation | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    forms: Sequence[FormKind] = FORMS,
    bits: Sequence[int] | None = None,
    rank_multiple: int = 1,
    min_rank: int = 1,
    part: str = "calibration",
    field: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int = 16,
    gradients: Gradients | None = None,
    probes: int | None = None,
    seed: int = 0,
    certify: bool = True,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    command: str = "",
    progress: Progress = silent,
) -> CompressedStream:
    """Compress a model that memory does not hold; killed at any time, the same call goes on where it was.

    What :func:`eckart.compress` and :func:`eckart.save` do together, with the plan that they make from predictions
    alone (``probe_rounds=0``), one block in memory at a time. Weights stay in their safetensors files. Forward, each
    block leaves its hidden states in a hidden folder beside ``output``; backward, each block runs again with the
    gradient at its output, so that one budget over the whole model (method ``kfac``) works as it does in memory. The
    result is bitwise the same however often the work was interrupted, given the same versions and machine; a run
    that is taken up again uses the number of threads that it began with. ``output`` appears whole at the end.

    ``bits`` (8, 4, 2) lets numbers be stored in so many bits, as in ``compress``: by default a budget in bytes under
    one global allocation chooses among 8, 4 and as they are. A method of narrower modules (``modules``, ``modegpt``)
    gives the MLPs of all blocks one width, so the result is a plain checkpoint with a smaller config. Of a mixture of
    experts, fused or one by one in the files, the moments of a few experts are collected at a time; the report says
    which experts no token reached.

    Differs from ``eckart.compress`` in: only maps inside of the blocks; dense, lowrank or pivoted, with few bits or
    without, or (with such a method) narrow at one width; no probes; the errors that the report predicts are those of
    the factors before they are rounded to the weights' dtype, and what few bits add to them is what the plan expected
    (between the ranks at which it was computed, interpolated); ``gradients`` None collects what the method needs and no
    more; files carry no time.

    Memory beside Python and torch: the moments of some maps of one block (16 (in² + out²) bytes each, as many as fit
    into twice the block's weights and 64 MB, at least one; of a mixture those of one expert and of all others
    together), the work space of one decomposition, the activations of one batch in one block, once the logits of one
    batch, and the experts of one block where they lie in the files one by one. Take a smaller ``batch_size`` where that
    is too much.
    Disk beside the result: hidden states (tokens × width, twice per block) and factors (1.5 to 4 times the blocks; with
    bits also half a moment per input, 4 in² bytes).
    Cost: that of ``compress``, and one more forward pass per block and group of maps.

    It does not help where the model fits into memory: ``compress`` is quicker then, takes every architecture, and
    corrects its plan by probes. A chain of blocks in one list is needed, so encoder-decoders and models with links
    between blocks are refused.

    Raises InputError, FileError, BudgetError, NotFiniteError before long work where that is possible, MismatchError
    where the hidden folder belongs to another command, model or data.
    """
    start = time.perf_counter()
    chosen = any_method(method or DEFAULT_METHOD)
    chosen_options = options_for(chosen, options or {})
    kind = _gradients_for(chosen, gradients, probes)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("streaming is the work of one process; start it without torchrun.")
    if data is None and chosen.needs:
        raise InputError(f"method {chosen.name!r} needs calibration data ({', '.join(sorted(chosen.needs))}).")
    asked = budget_from(keep, budget)
    modules = isinstance(chosen, ModuleMethod)
    usual: Allocation = "global" if chosen.loss_units and not modules else "uniform"
    wanted = Wanted(
        budget=asked,
        allocation=allocation or usual,
        forms=forms,
        bits=bits_from(bits, asked, chosen, allocation or usual),
        rank_multiple=rank_multiple,
        min_rank=min_rank,
        base=str(model),
        most=parse_size(max_shard_size),
    )
    wanted.check(chosen)
    source, target = Path(model), Path(output).resolve()
    if not work_folder(target).exists():
        check_output(target, overwrite=overwrite)
    if source.resolve() == target:
        raise InputError(f"{target} is what the result is made from; name another output.")
    loaded = load_model(source if source.is_dir() else str(model), mapped=True)
    sites = find_sites(loaded.model, include=include, exclude=exclude)
    route = Route(loaded.model)
    _refuse(sites, route, chosen)
    units, widths, foreseen = _foreseen(loaded.model, sites, wanted, chosen, chosen_options)
    known_sources = sources(loaded.model)
    dtype = next(loaded.model.parameters()).dtype
    identity_print = fingerprint(
        loaded.model, at_steps=None if known_sources is None else known_sources.at_steps(dtype)
    )
    batches: Sequence[Batch] = ()
    known: dict[str, Any] = {}
    if data is not None:
        batches, known = as_batches(
            loaded,
            data,
            part=part,
            field=field,
            samples=samples,
            length=length,
            batch_size=batch_size,
            seed=seed,
        )
        route.check(batches[0])
        _warn_scarce(batches, sites)
    measure = Measure(
        model=loaded.model,
        route=route,
        sites=sites,
        batches=batches if chosen.needs else (),
        method=chosen,
        options=chosen_options,
        wanted=wanted,
        loss=None if kind == "none" else loss_for(loaded),
        gradients=kind,
        probes=probes or DEFAULT_PROBES[loaded.task],
        seed=seed,
        certify=certify,
        fingerprint=identity_print,
        narrow=tuple(units),
        widths={c.site.name: one.rank for c, one in widths if isinstance(c.site, Unit) and one.form == "narrow"},
    )
    identity = {
        "model": measure.fingerprint,
        "weight files": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "data": _digest(measure.batches),
        "method": chosen.name,
        "options": dataclasses.asdict(chosen_options),
        "budget": str(wanted.budget),
        "allocation": wanted.allocation,
        "include": list(include),
        "exclude": list(exclude),
        "forms": list(forms),
        "bits": list(wanted.bits),
        "rank_multiple": rank_multiple,
        "min_rank": min_rank,
        "gradients": kind,
        "probes": measure.probes,
        "seed": seed,
        "certify": certify,
        "max_shard_size": wanted.most,
        "torch": torch.__version__,
        "Eckart": importlib.metadata.version("eckart"),
    }
    with _explained(target), claim_output(target):
        recover(target)
        fresh = not work_folder(target).exists()
        if fresh:
            _check_disk(target, measure, foreseen)
            _check_finite(loaded.model, sites, route)
        journal = open_journal(target, identity)
        if not journal.has(BEGUN):
            journal.done(BEGUN, {}, threads=torch.get_num_threads(), command=command)
        if not journal.has(SWAPPED):
            check_output(target, overwrite=overwrite)
        with _threads(int(journal.facts(BEGUN)["threads"])):
            result = stream(
                measure,
                journal,
                lambda entries: factored_like(loaded.model, source, entries),
                widths=widths,
                progress=progress,
            )
        copy_companions(result.model, loaded.tokenizer, source, result.folder)
        copy_sentence_files(loaded.name, result.folder)
        write_papers(
            result.folder,
            base=loaded.name,
            fingerprint=measure.fingerprint,
            plan=result.plan,
            outcome=result.outcome,
            curves=result.curves,
            calibration={"model": loaded.name, **known, **result.calibration} if data is not None else {},
            entries=describe(result.model),
            command=str(journal.facts(BEGUN)["command"]) or "eckart.compress_stream(…) in Python",
        )
        journal.done(SWAPPED, {})
        put_in_place(result.folder, target)
        shutil.rmtree(set_aside(journal.folder, target))
    for note in result.outcome.notes:
        warnings.warn(note, EckartWarning, stacklevel=2)
    return CompressedStream(
        folder=target,
        plan=result.plan,
        outcome=dataclasses.replace(result.outcome, seconds=time.perf_counter() - start),
        resumed=journal.resumed,
        bookkeeping_seconds=journal.seconds,
    )


def _foreseen(
    model: nn.Module, sites: Sequence[Site], wanted: Wanted, method: CompressMethod | ModuleMethod, options: Any
) -> tuple[list[UnitFacts], Chosen, int]:
    """The units that become narrower, what becomes of every unit and site, and about how many bytes that has.

    Raises InputError and BudgetError for what no calibration could help.
    """
    if not isinstance(method, ModuleMethod):
        return [], [], foreseen_bytes(model, sites, wanted)
    units, widths = equal_widths(model, sites, wanted, method, options)
    return units, widths, rest_of(model, sites).bytes + sum(choice.size.bytes for _, choice in widths)


def _check_finite(model: nn.Module, sites: Sequence[Site], route: Route) -> None:
    """``check_finite``, with the experts of one block in memory at a time."""
    check_finite(model, [site for site in sites if site.kind != "experts"])
    for index, block in enumerate(route.blocks):
        inside = [site for site in sites if site.kind == "experts" and site.name.startswith(f"{block.name}.")]
        if inside:
            with route.holding(index):
                check_finite(model, inside)


def _gradients_for(method: CompressMethod | ModuleMethod, gradients: Gradients | None, probes: int | None) -> Gradients:
    """What is collected: what the method needs, unless something else is asked for."""
    needed = bool(method.needs & {"gradient", "gradient_scale", "fisher"})
    if gradients not in (None, "full", "scale", "none"):
        raise InputError(f"gradients is 'full', 'scale' or 'none'; got {gradients!r}.")
    kind: Gradients = gradients or ("full" if needed else "none")
    if kind == "none" and needed:
        raise InputError(f"method {method.name!r} weighs errors by output gradients; gradients='none' collects none.")
    if probes is not None and (probes < 1 or kind == "none"):
        raise InputError(
            f"probes counts backward passes, at least 1, and needs gradients; got probes={probes} with "
            f"gradients={kind!r}."
        )
    return kind


def _refuse(sites: Sequence[Site], route: Route, method: CompressMethod | ModuleMethod) -> None:
    """Raises InputError with every site that cannot be streamed."""
    blocks = tuple(f"{block.name}." for block in route.blocks)
    wrong = [] if isinstance(method, ModuleMethod) else misfits(sites, method)
    for site in sites:
        if site.kind not in ("linear", "conv1d", "experts"):
            wrong.append(f"{site.name}: maps of kind {site.kind} are not streamed")
        elif site.tied:
            wrong.append(f"{site.name} shares its weight with {', '.join(site.tied)}")
        elif not site.name.startswith(blocks):
            wrong.append(f"{site.name} lies outside of the blocks")
    if wrong or not sites:
        raise InputError(problems("--stream cannot take every map; exclude these", wrong or ["there are no maps"]))


def _warn_scarce(batches: Sequence[Batch], sites: Sequence[Site]) -> None:
    tokens = sum(BatchTokens.of(batch, 0).tokens for batch in batches)
    few = [site for site in sites if site.kind != "experts" and site.in_features > tokens]
    if few:
        widest = max(few, key=lambda site: site.in_features)
        warnings.warn(
            f"{len(few)} maps have more inputs than the calibration has tokens (as {widest.name}: {tokens} of "
            f"{widest.in_features}). Their moments are singular and fit this data too well; calibrate on more.",
            EckartWarning,
            stacklevel=3,
        )


def _digest(batches: Sequence[Batch]) -> str:
    """A sha256 of all numbers of the batches, in hex."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in {"": batch}.items() if isinstance(batch, Tensor) else sorted(batch.items()):
            found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check_disk(target: Path, measure: Measure, whole: int) -> None:
    """Raises FileError where scratch and a result of ``whole`` bytes together do not fit onto the disk."""
    hidden = sum(measure.route.start(batch).nbytes for batch in measure.batches)
    scratch = scratch_bytes(measure, hidden)
    needed = scratch + whole + SPARE_BYTES
    parent = next(place for place in target.parents if place.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise FileError(
            f"{target} needs {needed / 1e9:.2f} GB of disk: {whole / 1e9:.2f} for the result and {scratch / 1e9:.2f} "
            f"while it is made; {parent} has {free / 1e9:.2f}. Calibrate on fewer tokens, or name another place."
        )


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise FileError(
                f"the disk is full. What is done is kept in {work_folder(target)}: make room and run the same command "
                "again, or remove that folder."
            ) from error
        raise


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """As many threads as the run began with: sums round differently with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
