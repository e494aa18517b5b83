"""Findings of weights while a model is trained: a line per weight to a file, or scalars to TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from eckart.errors import FileError, InputError, problems, unknown
from eckart.inspection.names import left_out
from eckart.inspection.source import Entry, open_source
from eckart.records import Finding
from eckart.spectra import (
    Spectrum,
    bulk,
    defects,
    farms,
    faults,
    marchenko_pastur,
    power_law,
    powerlaw,
    ranks,
    singular_values,
    spectrum,
    windows,
)

OfSpectrum = Callable[[Spectrum], Mapping[str, Finding]]
OfWeight = Callable[[Tensor, Entry], Mapping[str, Finding]]

FROM_SPECTRUM: dict[str, OfSpectrum] = {
    **dict.fromkeys(ranks.NAMES, spectrum),
    **dict.fromkeys(bulk.NAMES, marchenko_pastur),
    **dict.fromkeys(powerlaw.NAMES, power_law),
}
"""Findings that come out of the singular values, and what gives them."""


def _windows(W: Tensor, entry: Entry) -> Mapping[str, Finding]:
    return farms(W, kind=entry.kind, groups=entry.groups)


def _defects(W: Tensor, entry: Entry) -> Mapping[str, Finding]:
    return defects(W, kind=entry.kind, groups=entry.groups)


FROM_WEIGHT: dict[str, OfWeight] = {
    **dict.fromkeys(windows.NAMES, _windows),
    **dict.fromkeys(faults.NAMES, _defects),
}
"""Findings that take the weight itself."""


class Writer(Protocol):
    """What takes scalars, such as ``SummaryWriter`` of TensorBoard."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class FindingLogger:
    """Measures chosen findings of a model's weights every so many steps of any training loop.

    ::

        logger = FindingLogger(model, findings=("stable_rank", "distance_from_noise"), every=100, file="findings.jsonl")
        for batch in data:
            ...
            optimizer.step()
            logger.step()

    ``findings``: names out of ``FROM_SPECTRUM`` and ``FROM_WEIGHT`` of its module, or functions of a weight that give a
    Finding. ``file``: a path, to which one JSON object per weight and finding is added (``step``, ``weight`` and the
    fields of the Finding but its details), or a writer with ``add_scalar``, which gets ``finding/weight`` where there
    is a value. ``include`` and ``exclude`` as for :func:`eckart.inspection.inspect_weights`. Weights that cannot be
    measured (vectors, quantised ones) are left out; ``skipped`` names them with the reason.

    It reads weights and changes nothing: no gradients, no random numbers, no hooks. A measurement costs what the
    findings cost; ``distance_from_noise`` needs windows only. Under sharded training give it the whole weights.

    Raises InputError for unknown names and patterns, ``every`` < 1, and a model without a weight to measure; FileError
    where the file cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        findings: Sequence[str | Callable[[Tensor], Finding]] = ("stable_rank", "distance_from_noise"),
        *,
        every: int = 100,
        file: str | os.PathLike[str] | Writer,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.findings = tuple(findings)
        self.every = every
        self.steps = 0
        """How often :meth:`step` was called without a number."""
        self.skipped: dict[str, str] = {}
        """Tensors that are not measured, with the reason."""
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._writer: Writer | None = None
        self._path: Path | None = None
        self._check()
        if isinstance(file, (str, os.PathLike)):
            self._path = Path(file)
            self._append("")
        else:
            self._writer = file

    def step(self, step: int | None = None) -> bool:
        """Call it once a step: measures at steps 0, ``every``, 2 · ``every`` …; returns whether it did.

        ``step``: the number of this step, where the loop counts itself; otherwise calls are counted.
        """
        if step is None:
            step = self.steps
            self.steps += 1
        if step % self.every:
            return False
        self.log(step)
        return True

    @torch.no_grad()
    def log(self, step: int) -> dict[str, dict[str, Finding]]:
        """Measure and write now; returns the findings by weight and name."""
        source = open_source(self.model)
        found = {entry.name: self._measure(source.read(entry.name), entry) for entry in self._entries()}
        lines = []
        for name, findings in found.items():
            for finding in findings.values():
                plain = finding.to_json()
                del plain["details"]
                lines.append(json.dumps({"step": step, "weight": name, **plain}, ensure_ascii=False))
                if self._writer is not None and finding.value is not None:
                    self._writer.add_scalar(f"{finding.name}/{name}", finding.value, step)
        if self._path is not None:
            self._append("".join(f"{line}\n" for line in lines))
        return found

    def _measure(self, W: Tensor, entry: Entry) -> dict[str, Finding]:
        names = [name for name in self.findings if isinstance(name, str)]
        known: dict[str, Finding] = {}
        s = None
        for name in names:
            if name in known:
                continue
            if name in FROM_WEIGHT:
                known |= FROM_WEIGHT[name](W, entry)
            else:
                s = s or singular_values(W, kind=entry.kind, groups=entry.groups)
                known |= FROM_SPECTRUM[name](s)
        found = {name: known[name] for name in names}
        for function in self.findings:
            if not isinstance(function, str):
                finding = function(W)
                found[finding.name] = finding
        return found

    def _entries(self) -> list[Entry]:
        entries = open_source(self.model).entries
        out = left_out([entry.name for entry in entries], self._include, self._exclude)
        reasons = {entry.name: entry.reason or out.get(entry.name, "") for entry in entries}
        self.skipped = {name: reason for name, reason in reasons.items() if reason}
        return [entry for entry in entries if not reasons[entry.name]]

    def _check(self) -> None:
        known = {**FROM_SPECTRUM, **FROM_WEIGHT}
        found = [
            unknown("finding", name, known) for name in self.findings if isinstance(name, str) and name not in known
        ]
        if not self.findings:
            found.append("findings names at least one")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            found.append(f"every counts steps, at least 1; got {self.every!r}")
        if not self._entries():
            found.append("the model has no weight that can be measured")
        if found:
            raise InputError(problems("FindingLogger", found))

    def _append(self, text: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise FileError(f"{self._path} cannot be written: {error}.") from error
