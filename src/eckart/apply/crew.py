"""Jobs without order, done by several processes: each does some of them, and all of them get all results.

A crew is a way to share them. :class:`Group` deals them to the processes that ``torchrun`` started;
:class:`eckart.apply.queue.Queue` to whoever looks into a shared folder. Results travel as parcels, tensors and a JSON
value, bit for bit, so that every process goes on with the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import sha256
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eckart import errors
from eckart.errors import EckartError, InputError, MismatchError
from eckart.moments.distributed import answers, cpu_group, gather, processes
from eckart.planning import Plan
from eckart.records import Progress, silent

T = TypeVar("T")
ALIGNMENT = 16
"""Bytes: tensors begin at multiples of this in a message, as their dtypes need."""


@dataclass(frozen=True)
class Job:
    """Something to be done by one of the processes."""

    name: str
    """Of the site that it is about."""
    cost: float = 1.0
    """In any unit, the same for all jobs of a list."""


@dataclass(frozen=True)
class Parcel:
    """The result of a job."""

    note: Any = None
    """JSON."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Work = Callable[[int], Parcel]
"""Does the job of this index."""


class Crew(Protocol):
    """A way to share jobs."""

    def do(self, stage: str, jobs: Sequence[Job], work: Work, progress: Progress = silent) -> list[Parcel]:
        """The results of all jobs, in their order, in every process. All of them call this with equal jobs."""

    def settle(self, plan: Plan) -> Plan:
        """One plan for all, where rounding on different machines gave plans that differ."""


def crew_of(given: Crew | None) -> Crew | None:
    """The crew that was given, else the processes of ``torchrun``; None for a process on its own."""
    return given if given is not None or processes() == 1 else Group()


def deal(costs: Sequence[float], hands: int) -> list[int]:
    """For each job the hand that does it: the longest first, each to the hand that has the least to do so far.

    At most 4/3 − 1/(3·hands) times as long as the best deal. Equal costs give equal deals.

    Reference: R. L. Graham, “Bounds on Multiprocessing Timing Anomalies”, 1969.
    """
    load = [0.0] * hands
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[job] = min(range(hands), key=lambda hand: (load[hand], hand))
        load[owners[job]] += costs[job]
    return owners


class Group:
    """The processes of the default ``torch.distributed`` group."""

    def do(self, stage: str, jobs: Sequence[Job], work: Work, progress: Progress = silent) -> list[Parcel]:
        """As :meth:`Crew.do`, dealt by cost. Memory: the results of all jobs, in every process.

        What one process raises on purpose, all of them raise. Raises EckartError where another process ended, and
        MismatchError where the processes were given different jobs.
        """
        owners = deal([job.cost for job in jobs], processes())
        mine = [index for index, owner in enumerate(owners) if owner == dist.get_rank()]
        names = sha256("\n".join(job.name for job in jobs).encode()).hexdigest()
        done: dict[int, Parcel] = {}
        trouble: EckartError | None = None
        for count, index in enumerate(mine):
            progress(stage, count, len(mine))
            try:
                done[index] = work(index)
            except EckartError as error:
                trouble = error
                break
        progress(stage, len(mine), len(mine))
        with answers(stage):
            group = cpu_group()
            heads = gather(
                {
                    "jobs": names,
                    "trouble": None if trouble is None else [type(trouble).__name__, str(trouble)],
                    "parcels": {str(index): [parcel.note, _layout(parcel)] for index, parcel in done.items()},
                },
                group,
            )
        if trouble is not None:
            raise trouble
        for head in heads:
            if head["trouble"] is not None:
                raise getattr(errors, head["trouble"][0], EckartError)(head["trouble"][1])
        if any(head["jobs"] != names for head in heads):
            raise MismatchError("the processes have different sites. Start all of them with the same arguments.")
        found = []
        with answers(stage):
            for index, owner in enumerate(owners):
                note, layout = heads[owner]["parcels"][str(index)]
                message = _message(done.pop(index), layout) if index in done else _empty(layout)
                if message.numel():
                    dist.broadcast(message, src=owner, group=group)
                found.append(Parcel(note, _opened(message, layout)))
        return found

    def settle(self, plan: Plan) -> Plan:
        """That of the first process."""
        with answers("settle the plan"):
            return Plan.from_json(gather(plan.to_json(), cpu_group())[0])


def do_all(
    crew: Crew | None,
    stage: str,
    jobs: Sequence[Job],
    work: Callable[[int], T],
    given: Callable[[int], Mapping[str, Tensor]] | None = None,
    progress: Progress = silent,
) -> list[T]:
    """What ``work`` gives for each job: by the ``crew``, else one after the other.

    ``given(index)`` are tensors that every process has, which need not travel. See :func:`packed` for what can.
    """
    if crew is None:
        found = []
        for done in range(len(jobs)):
            progress(stage, done, len(jobs))
            found.append(work(done))
        progress(stage, len(jobs), len(jobs))
        return found

    def parcel(index: int) -> Parcel:
        tensors: dict[str, Tensor] = {}
        return Parcel(packed(work(index), {} if given is None else given(index), tensors), tensors)

    parcels = crew.do(stage, jobs, parcel, progress)
    return [unpacked(one.note, {} if given is None else given(index), one.tensors) for index, one in enumerate(parcels)]


def wait(what: str) -> None:
    """Wait until all processes are here. Raises EckartError that says which of them ended or did not come."""
    if processes() > 1:
        with answers(what):
            gather(None, cpu_group())


def _layout(parcel: Parcel) -> list[Any]:
    """Name, dtype, shape and first byte of each tensor in a message."""
    start, rows = 0, []
    for name, tensor in parcel.tensors.items():
        rows.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), start])
        start += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return [rows, start]


def _empty(layout: Sequence[Any]) -> Tensor:
    return torch.zeros(layout[1], dtype=torch.uint8)


def _message(parcel: Parcel, layout: Sequence[Any]) -> Tensor:
    """All tensors as bytes: one broadcast, whatever their dtypes are."""
    message = _empty(layout)
    for (_, _, _, start), tensor in zip(layout[0], parcel.tensors.values(), strict=True):
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        message[start : start + flat.numel()] = flat
    return message


def _opened(message: Tensor, layout: Sequence[Any]) -> dict[str, Tensor]:
    found = {}
    for name, kind, shape, start in layout[0]:
        dtype = getattr(torch, kind)
        count = torch.Size(shape).numel() * dtype.itemsize
        found[name] = message[start : start + count].view(dtype).reshape(shape)
    return found


def packed(value: Any, given: Mapping[str, Tensor], tensors: dict[str, Tensor], name: str = "") -> Any:
    """``value`` as JSON; its tensors go into ``tensors``, those that ``given`` has too are only named.

    For records (frozen dataclasses of Eckart), tuples, lists, mappings with text keys, tensors and JSON's own values.
    Raises InputError for anything else.
    """
    if isinstance(value, Tensor):
        for known, tensor in given.items():
            if value.dtype == tensor.dtype and value.shape == tensor.shape and torch.equal(value, tensor):
                return {"given": known}
        tensors[name] = value
        return {"tensor": name, "cpu": value.device.type == "cpu"}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        sort = "tuple" if isinstance(value, tuple) else "list"
        return {sort: [packed(item, given, tensors, f"{name}/{i}") for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"map": {key: packed(item, given, tensors, f"{name}/{key}") for key, item in value.items()}}
    kind = type(value)
    if is_dataclass(kind) and kind.__module__.startswith("eckart."):
        parts = {
            part.name: packed(getattr(value, part.name), given, tensors, f"{name}/{part.name}")
            for part in fields(kind)
            if part.init
        }
        return {"record": [kind.__module__, kind.__qualname__], "fields": parts}
    raise InputError(f"{kind.__name__} holds something that processes cannot send each other; run in one process.")


def unpacked(note: Any, given: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Any:
    """The way back from :func:`packed`. Tensors that were not on the CPU go where the first of ``given`` is."""
    if not isinstance(note, dict):
        return note
    if "given" in note:
        return given[note["given"]]
    if "tensor" in note:
        tensor = tensors[note["tensor"]]
        return tensor if note["cpu"] else tensor.to(next(iter(given.values())).device)
    if "tuple" in note:
        return tuple(unpacked(item, given, tensors) for item in note["tuple"])
    if "list" in note:
        return [unpacked(item, given, tensors) for item in note["list"]]
    if "map" in note:
        return {key: unpacked(item, given, tensors) for key, item in note["map"].items()}
    module, kind = note["record"]
    record = getattr(sys.modules.get(module), kind, None) if module.startswith("eckart.") else None
    if not (isinstance(record, type) and is_dataclass(record)):
        raise MismatchError(f"another process sent a {kind}, unknown to this Eckart. Use one version everywhere.")
    return record(**{key: unpacked(item, given, tensors) for key, item in note["fields"].items()})
