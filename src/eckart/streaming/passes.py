"""The two passes of a streamed calibration: forward from block to block, and back with the gradients.

Forward, each block reads the hidden states that the one before it left on disk. Backward, each block runs once more
from its stored input, and the stored gradient at its output goes through it: input moments and gradient moments of
its sites come out, are decomposed and leave memory; the gradient at its input is left for the block before it.
So the moments are those of the whole dense model, as :func:`eckart.calibrate` collects them, and one budget
over all blocks can be solved for, with one block in memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.apply.bits import quantisable
from eckart.checkpoint.weights import Layout, Mark, TensorWriter, read_tensors
from eckart.compression import CompressMethod
from eckart.errors import NotFiniteError
from eckart.modules import ModuleMethod, UnitFacts
from eckart.moments import Batch, Gradients, LossFn, Moments
from eckart.moments.collect import draws, evaluating
from eckart.moments.segment import Passage, collect_segment
from eckart.moments.tokens import BatchTokens
from eckart.records import Progress, Site
from eckart.streaming.factors import Matrix, decompose_to_file, give_back_memory, write_second
from eckart.streaming.journal import Journal
from eckart.streaming.narrow import cut_to_file, needed
from eckart.streaming.plan import Wanted, number_bytes
from eckart.streaming.route import Route

SPARE = 64_000_000
"""Bytes of moments that are collected at a time, beside twice the weights of the block."""
DOUBLE = 8


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured, on what, and how."""

    model: nn.Module
    """With mapped weights."""
    route: Route
    sites: tuple[Site, ...]
    batches: Sequence[Batch]
    """Empty for methods that need no moments."""
    method: CompressMethod | ModuleMethod
    options: Any
    wanted: Wanted
    loss: LossFn | None
    """None: no backward pass."""
    gradients: Gradients
    probes: int
    seed: int
    certify: bool
    fingerprint: str
    narrow: tuple[UnitFacts, ...] = ()
    """For methods of narrower modules: the units,"""
    widths: Mapping[str, int] = field(default_factory=dict)
    """and what is left of those that become narrower, by name."""

    @property
    def backward(self) -> bool:
        return self.gradients != "none"

    def inside(self, block: int) -> tuple[Site, ...]:
        """The sites of a block."""
        name = f"{self.route.blocks[block].name}."
        return tuple(site for site in self.sites if site.name.startswith(name))

    def units_inside(self, block: int) -> tuple[UnitFacts, ...]:
        """The units of a block that become narrower."""
        name = f"{self.route.blocks[block].name}."
        return tuple(
            each for each in self.narrow if each.unit.name in self.widths and each.unit.sites[0].startswith(name)
        )

    def reach(self) -> tuple[int, int]:
        """The first block with sites, and the last that has to be run."""
        holding = [block for block in range(len(self.route)) if self.inside(block)]
        return holding[0], len(self.route) - 1 if self.backward else holding[-1]

    def weight_bytes(self, block: int) -> int:
        module = self.model.get_submodule(self.route.blocks[block].name)
        return sum(parameter.nbytes for parameter in module.parameters())


def inputs_unit(block: int) -> str:
    """Hidden states that enter a block; with the number of blocks, those that leave the last."""
    return f"inputs-{block:04d}"


def gradients_unit(block: int) -> str:
    """Gradients at the same place."""
    return f"gradients-{block:04d}"


def block_unit(block: int) -> str:
    """The decompositions of a block's sites, and the gradients at its input."""
    return f"block-{block:04d}"


def factor_file(block: int, index: int, expert: int | None = None) -> str:
    """The file of a site, or of one expert, or of a unit, by its position in the block."""
    return f"{block_unit(block)}-{index:03d}{'' if expert is None else f'-{expert:04d}'}.safetensors"


def factor_files(block: int, index: int, site: Site) -> list[str]:
    """The files of all slices of a site."""
    if site.kind != "experts":
        return [factor_file(block, index)]
    return [factor_file(block, index, expert) for expert in range(site.slices)]


def second_file(block: int, index: int) -> str:
    """E[x xᵀ] of what the site at this position, and others, read."""
    return f"{block_unit(block)}-{index:03d}-reads.safetensors"


def units(measure: Measure, journal: Journal, progress: Progress) -> Iterator[tuple[str, Callable[[], None]]]:
    """All units of work in their order, and what makes each."""
    first, last = measure.reach()
    pass_ = _Pass(measure, journal)
    places = 0 if not measure.batches else last + 2 if measure.backward else last + 1
    for block in range(places):
        progress("forward", block, places)
        yield inputs_unit(block), lambda block=block: pass_.forward(block)  # type: ignore[misc]
    if places:
        progress("forward", places, places)
    if measure.backward:
        yield gradients_unit(last + 1), lambda: pass_.loss(last + 1)
    for done, block in enumerate(range(last, first - 1, -1)):
        progress("decompose", done, last - first + 1)
        yield block_unit(block), lambda block=block: pass_.back(block, leaves=block > first)  # type: ignore[misc]
    progress("decompose", last - first + 1, last - first + 1)


def units_of(measure: Measure, journal: Journal) -> float:
    """What the loss was summed over, or rows where there is none."""
    if measure.backward:
        return float(journal.facts(gradients_unit(len(measure.route)))["units"])
    return float(sum(BatchTokens.of(batch, 0).rows for batch in measure.batches))


def scratch_bytes(measure: Measure, hidden: int) -> int:
    """What the files of both passes take, ``hidden`` being the bytes of all hidden states at one place."""
    first, last = measure.reach()
    states = (last + 1) * hidden
    if measure.backward:
        states += hidden + (last + 1 - first) * hidden * measure.probes
    factors = 0
    for site in measure.sites:
        width = max(4, number_bytes(measure.model, site))
        if isinstance(measure.method, ModuleMethod):
            factors += site.weight_parameters * width
            continue
        factors += site.slices * site.full_rank * (site.in_features + site.out_features) * width
        if measure.wanted.bits:
            factors += site.in_features**2 * DOUBLE // 2
    return states + factors


@dataclass(frozen=True)
class Portion:
    """A site, or some experts of a mixture, whose moments are collected together."""

    site: Site
    slices: tuple[int, ...]

    @property
    def experts(self) -> bool:
        return self.site.kind == "experts"


def groups(sites: Sequence[Site], most: int, gradients: Gradients) -> list[list[Portion]]:
    """The sites in runs whose moments take at most ``most`` bytes; a larger site is a run of its own.

    Two halves in float64: 16 (in² + out²) bytes a matrix, inputs that are shared counted for each. Of a mixture, the
    moments of some experts are collected at a time, at least one, and those of all others together in one more.
    """
    found: list[list[Portion]] = []
    room = 0
    for site in sites:
        each = 2 * DOUBLE * (site.in_features**2 + (site.out_features**2 if gradients == "full" else 0))
        left = tuple(range(site.slices))
        while left:
            fits = len(left) if each * len(left) <= room else room // each - 1
            if not found or fits < 1:
                found.append([])
                room = max(most, each * min(2, len(left)))
                continue
            part, left = left[:fits], left[fits:]
            found[-1].append(Portion(site, part))
            room -= each * (len(part) + bool(left))
    return found


def unit_groups(
    units: Sequence[UnitFacts], sites: Mapping[str, Site], most: int, gradients: Gradients
) -> list[list[UnitFacts]]:
    """Units in runs whose moments take at most ``most`` bytes, as in :func:`groups`."""
    found: list[list[UnitFacts]] = []
    room = 0
    for each in units:
        takes = 0
        for name in needed(each):
            m, n = sites[name].out_features, sites[name].in_features
            takes += 2 * DOUBLE * (n**2 + (m**2 if gradients == "full" else 0))
        if not found or takes > room:
            found.append([])
            room = max(most, takes)
        found[-1].append(each)
        room -= takes
    return found


Work = tuple[Sequence[Portion], Callable[[Moments | None], Iterator[tuple[str, tuple[Mark, float]]]]]
"""What is collected together, and what then writes files: (name, (mark, seconds of its CRC)) each."""


def _nothing(moments: Moments | None) -> Iterator[tuple[str, tuple[Mark, float]]]:
    """For blocks that only pass gradients on."""
    return iter(())


def _second(moments: Moments, site: Site) -> Tensor:
    second = moments.site(site.name).second
    assert second is not None
    return second


def _without_tokens(
    group: Sequence[Portion], moments: Moments | None, known: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """The experts that no token reached, by site, added to those that are known."""
    found: dict[str, list[int]] = {}
    for portion in group:
        if portion.experts and moments is not None:
            count = moments.inputs[moments.input_of[portion.site.name]].count.sum(0).tolist()
            lost = [slice_ for slot, slice_ in enumerate(portion.slices) if not count[slot]]
            if lost:
                found[portion.site.name] = [*known.get(portion.site.name, ()), *lost]
    return found


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The layout of what lies under ``batch`` or ``batch.probe``: by number, while files list ``10`` before ``2``."""
    names = sorted(tensors, key=lambda name: [int(part) for part in name.split(".")])
    return {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}


class _Pass:
    """Makes the units of one run."""

    def __init__(self, measure: Measure, journal: Journal) -> None:
        self._measure = measure
        self._journal = journal
        self._folder = journal.folder

    def forward(self, block: int) -> None:
        """The hidden states that enter ``block``, from those that enter the one before it."""
        measure, route = self._measure, self._measure.route
        with torch.no_grad(), evaluating(measure.model):
            if block == 0:
                shapes = [route.start(batch) for batch in measure.batches]
                layout = {str(i): (state.dtype, tuple(state.shape)) for i, state in enumerate(shapes)}
                del shapes
                states = (route.start(batch) for batch in measure.batches)
            else:
                known = self._read(inputs_unit(block - 1))
                layout = _in_order(known)
                states = (route.call(block - 1, batch)(known[str(i)]) for i, batch in enumerate(measure.batches))
            unit = inputs_unit(block)
            with route.holding(block - 1) if block else contextlib.nullcontext():
                mark = self._write(unit, layout, states)
        self._journal.done(unit, {f"{unit}.safetensors": mark})
        give_back_memory()

    def loss(self, block: int) -> None:
        """The gradients at the last hidden states, one per batch and probe."""
        measure = self._measure
        known = self._read(inputs_unit(block))
        layout = {
            f"{i}.{probe}": (known[str(i)].dtype, tuple(known[str(i)].shape))
            for i in range(len(measure.batches))
            for probe in range(measure.probes)
        }
        units = 0.0

        def found() -> Iterator[Tensor]:
            nonlocal units
            for i, batch in enumerate(measure.batches):
                generator = draws(measure.seed, i)
                hidden = known[str(i)].detach().requires_grad_()
                with torch.enable_grad(), evaluating(measure.model):
                    outputs = measure.route.finish(batch, hidden)
                    for probe in range(measure.probes):
                        assert measure.loss is not None
                        value, count = measure.loss(outputs, batch, generator)
                        if not bool(torch.isfinite(value)):
                            raise NotFiniteError(
                                f"the loss is {float(value)}. Check the last blocks, the head and the data."
                            )
                        units += float(count) / measure.probes
                        more = probe < measure.probes - 1
                        yield torch.autograd.grad(value, hidden, retain_graph=more)[0]
                del outputs, value

        unit = gradients_unit(block)
        mark = self._write(unit, layout, found())
        self._journal.done(unit, {f"{unit}.safetensors": mark}, units=units)
        give_back_memory()

    def back(self, block: int, *, leaves: bool) -> None:
        """Decompose the sites of ``block`` and, where it ``leaves`` any, write the gradients at its input."""
        measure = self._measure
        entering = self._read(inputs_unit(block)) if measure.batches else {}
        arriving = self._arriving(block)
        files: dict[str, Mark] = {}
        unseen: dict[str, list[int]] = {}
        leaves = leaves and measure.backward
        limit = 2 * measure.weight_bytes(block) + SPARE
        work = self._narrow(block, limit) if isinstance(measure.method, ModuleMethod) else self._factors(block, limit)
        unit = f"{gradients_unit(block)}.safetensors"
        with measure.route.holding(block):
            for group, make in work or ([([], _nothing)] if leaves else []):
                if leaves and unit not in files:
                    layout = _in_order(arriving)
                    with TensorWriter(self._folder / unit, layout) as writer:
                        moments = self._collect(block, group, entering, arriving, writer)
                    self._journal.seconds += writer.seconds
                    files[unit] = writer.mark
                else:
                    moments = self._collect(block, group, entering, arriving, None)
                give_back_memory()
                unseen |= _without_tokens(group, moments, unseen)
                for name, (mark, seconds) in make(moments):
                    files[name] = mark
                    self._journal.seconds += seconds
                del moments
                give_back_memory()
        self._journal.done(block_unit(block), files, unseen=unseen)

    def _factors(self, block: int, limit: int) -> list[Work]:
        """The sites of a block in groups, and what decomposes each."""
        measure = self._measure
        places = {site.name: index for index, site in enumerate(measure.inside(block))}

        def make(group: Sequence[Portion], moments: Moments | None) -> Iterator[tuple[str, tuple[Mark, float]]]:
            assert isinstance(measure.method, CompressMethod)
            written: dict[str, int] = {}
            for portion in group:
                site, place = portion.site, places[portion.site.name]
                reads = place
                if measure.wanted.bits and moments is not None and quantisable(site):
                    key = moments.input_of[site.name]
                    if key not in written:
                        written[key] = place
                        name = second_file(block, place)
                        yield name, write_second(self._folder / name, _second(moments, site))
                    reads = written[key]
                for slot, slice_ in enumerate(portion.slices):
                    name = factor_file(block, place, slice_ if portion.experts else None)
                    yield (
                        name,
                        decompose_to_file(
                            self._folder / name,
                            measure.model,
                            Matrix(site=site, slice=slice_, slot=slot, reads=reads),
                            moments,
                            measure.method,
                            measure.options,
                            measure.wanted,
                            certify=measure.certify,
                        ),
                    )

        found = groups(measure.inside(block), limit, measure.gradients)
        return [(group, functools.partial(make, group)) for group in found]

    def _narrow(self, block: int, limit: int) -> list[Work]:
        """The units of a block that become narrower in groups, and what cuts each."""
        measure = self._measure
        sites = measure.inside(block)
        by_name = {site.name: site for site in sites}
        inside = measure.units_inside(block)
        places = {each.unit.name: index for index, each in enumerate(inside)}

        def make(group: Sequence[UnitFacts], moments: Moments | None) -> Iterator[tuple[str, tuple[Mark, float]]]:
            assert isinstance(measure.method, ModuleMethod)
            assert moments is not None
            for each in group:
                name = factor_file(block, places[each.unit.name])
                yield (
                    name,
                    cut_to_file(
                        self._folder / name,
                        measure.model,
                        each,
                        measure.widths[each.unit.name],
                        sites,
                        moments,
                        measure.method,
                        measure.options,
                        certify=measure.certify,
                    ),
                )

        found: list[Work] = []
        for group in unit_groups(inside, by_name, limit, measure.gradients):
            names = dict.fromkeys(name for each in group for name in needed(each))
            found.append(([Portion(by_name[name], (0,)) for name in names], functools.partial(make, group)))
        return found

    def _arriving(self, block: int) -> dict[str, Tensor]:
        measure = self._measure
        if not measure.backward:
            return {}
        last = block + 1 == len(measure.route)
        self._journal.require(gradients_unit(block + 1) if last else block_unit(block + 1))
        return read_tensors(self._folder / f"{gradients_unit(block + 1)}.safetensors")

    def _collect(
        self,
        block: int,
        group: Sequence[Portion],
        entering: Mapping[str, Tensor],
        arriving: Mapping[str, Tensor],
        writer: TensorWriter | None,
    ) -> Moments | None:
        measure = self._measure
        if not measure.batches:
            return None
        probes = measure.probes if measure.backward else 0
        passages = (
            Passage(
                batch,
                entering[str(i)],
                measure.route.call(block, batch),
                [arriving[f"{i}.{probe}"] for probe in range(probes)],
            )
            for i, batch in enumerate(measure.batches)
        )

        def arrived(index: int, probe: int, gradient: Tensor) -> None:
            if writer is not None:
                writer.write(f"{index}.{probe}", gradient)

        return collect_segment(
            measure.model,
            [portion.site for portion in group],
            passages,
            gradients=measure.gradients,
            fisher=measure.gradients == "full" and "fisher" in measure.method.needs,
            fingerprint=measure.fingerprint,
            units=units_of(measure, self._journal),
            arrived=arrived,
            experts={portion.site.name: portion.slices for portion in group if portion.experts},
        )

    def _read(self, unit: str) -> dict[str, Tensor]:
        self._journal.require(unit)
        return read_tensors(self._folder / f"{unit}.safetensors")

    def _write(self, unit: str, layout: Layout, tensors: Iterator[Tensor]) -> Mark:
        with TensorWriter(Path(self._folder) / f"{unit}.safetensors", layout) as writer:
            for name, tensor in zip(layout, tensors, strict=True):
                writer.write(name, tensor)
        self._journal.seconds += writer.seconds
        return writer.mark
