"""A folder that several processes see, as the place where they share work: no cluster software, any scheduler.

Each worker, on whatever machine, runs the same command with the same folder. It claims a job by creating a
file, does it, writes the result beside, and takes the next; who comes later finds less to do, and who is killed
is replaced after ``TTL`` seconds. The folder can be thrown away afterwards, or kept to compress again in seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eckart.apply.crew import Job, Parcel, Work
from eckart.checkpoint.claims import WRITTEN, Claims, create, read_json, written
from eckart.errors import EckartError, FileError
from eckart.planning import Plan
from eckart.records import Progress, silent

FORMAT_VERSION = 1
TTL = 120.0
"""Seconds without a sign of life after which a worker counts as dead. Living ones give four in that time."""
ATTEMPTS = 3
"""How often a job may fail, or kill its worker, before it is given up."""
_NOTE = "eckart"


class Queue:
    """A crew of all processes that have the same folder; see :class:`eckart.apply.crew.Crew`.

    Args:
        folder: is made where it does not exist.
        about: what is computed from what, as JSON: everything that results depend on.
        ttl: seconds after which a silent worker's job is taken over. Must exceed the longest pause of a file server.
        attempts: after so many failures a job is given up.

    Raises MismatchError where the folder belongs to something else, FileError where it cannot be used.
    """

    def __init__(
        self, folder: str | os.PathLike[str], about: Mapping[str, Any], *, ttl: float = TTL, attempts: int = ATTEMPTS
    ) -> None:
        self.folder = Path(folder).resolve()
        self.attempts = attempts
        self.written: dict[str, Any] | None = None
        """Who has written the result, and where, once that is known."""
        self.wrote = False
        """Whether it was this process."""
        try:
            self.claims = Claims(self.folder, ttl=ttl)
            self.claims.agree("job.json", {"format_version": FORMAT_VERSION, **about})
        except OSError as error:
            raise FileError(f"the queue {self.folder} cannot be used: {error}.") from error

    def settle(self, plan: Plan) -> Plan:
        """That of the worker that was first to have one."""
        path = self.folder / "plan.json"
        return plan if create(path, plan.dumps()) else Plan.from_json(read_json(path))

    def do(self, stage: str, jobs: Sequence[Job], work: Work, progress: Progress = silent) -> list[Parcel]:
        """As :meth:`Crew.do`, the longest jobs first; waits for those that others do. Disk: all results.

        An error that Eckart raises on purpose is raised here, since it would come again. Other failures are
        written down, and the job is tried again, by whoever comes, up to ``attempts`` times; then
        EckartError is raised with all that is known. Ctrl-C gives the job back.
        """
        if not jobs:
            return []
        place = self.folder / f"{stage}-{sha256(repr([job.name for job in jobs]).encode()).hexdigest()[:12]}"
        place.mkdir(exist_ok=True)
        order = sorted(range(len(jobs)), key=lambda index: (-jobs[index].cost, index))
        while True:
            there = {path.name for path in place.iterdir()}
            failures = Counter(name[:6] for name in there if ".failed-" in name)
            left = [index for index in order if _result(index) not in there]
            progress(stage, len(jobs) - len(left), len(jobs))
            if not left:
                return [_read(place / _result(index)) for index in range(len(jobs))]
            alive = [index for index in left if failures[f"{index:06d}"] < self.attempts]
            if not any(self._try(place, index, work) for index in alive):
                if not alive:
                    raise EckartError(self._given_up(place, left, jobs))
                time.sleep(min(1.0, self.claims.ttl / 10))

    def _try(self, place: Path, index: int, work: Work) -> bool:
        """Whether the job was free and has been worked on."""
        claim = place / f"{index:06d}.claim"
        if owner := self.claims.take_away(claim):
            self._failed(place, index, owner, "its worker ended, or gave no sign of life")
            return True
        with self.claims.hold(claim) as mine:
            if not mine or (place / _result(index)).exists():
                return False
            try:
                _write(place / _result(index), work(index))
            except EckartError:
                raise
            except Exception as error:
                self._failed(place, index, self.claims.me, f"{type(error).__name__}: {error}")
        return True

    def _failed(self, place: Path, index: int, worker: str, why: str) -> None:
        name = f"{index:06d}.failed-{secrets.token_hex(4)}.json"
        create(place / name, json.dumps({"worker": worker, "why": why}))

    def _given_up(self, place: Path, left: Sequence[int], jobs: Sequence[Job]) -> str:
        lines = []
        for index in left:
            files = sorted(place.glob(f"{index:06d}.failed-*.json"), key=lambda path: path.stat().st_mtime)
            last = read_json(files[-1])
            lines.append(f"  - {jobs[index].name}: last {last['why']} ({last['worker']})")
        return "\n".join(
            [
                f"{len(left)} of {len(jobs)} jobs failed {self.attempts} times each and were given up:",
                *lines,
                f"What is done stays in {self.folder}. Remove {place.name}/*.failed-* there to try again.",
            ]
        )

    @contextmanager
    def output(self, folder: str | os.PathLike[str]) -> Iterator[bool]:
        """Yields True to the one process that shall write the result, to ``folder``; False to all others, once it is
        written. Then ``written`` says by whom and where. Where the one that writes dies, another gets the turn."""
        claim = self.folder / "output.claim"
        while True:
            self.written = written(self.folder)
            if self.written is not None:
                yield False
                return
            self.claims.take_away(claim)
            with self.claims.hold(claim) as mine:
                if mine and written(self.folder) is None:
                    yield True
                    self.written = {"folder": str(Path(folder).resolve()), "worker": self.claims.me}
                    self.wrote = create(self.folder / WRITTEN, json.dumps(self.written))
                    return
            time.sleep(min(1.0, self.claims.ttl / 10))


def _result(index: int) -> str:
    return f"{index:06d}.safetensors"


def _write(path: Path, parcel: Parcel) -> None:
    """Beside its place, then into it."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    tensors = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in parcel.tensors.items()
    }
    try:
        save_file(tensors, beside, metadata={_NOTE: json.dumps(parcel.note)})
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> Parcel:
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[_NOTE])
            return Parcel(note, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{path} is damaged ({error}). Remove it, and run again.") from error
