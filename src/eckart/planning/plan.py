"""Plans: what happens to every site, as JSON that a person can read and edit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eckart.errors import EckartError, FileError, InputError, MismatchError, problems, unknown
from eckart.planning.curve import FORMS
from eckart.planning.solver import Allocation
from eckart.records import BUDGET_WORDS, Budget, FormKind, Size

FORMAT_VERSION = 1
_STORAGE = ("bits", "group", "repair", "of")
"""How a step stores its numbers; left out where they stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to one site, or to a unit of sites that become narrower together."""

    site: str
    """Dotted name; of a unit with its kind, ``model.layers.0.mlp#neurons``."""
    form: FormKind
    rank: int = 0
    """Directions kept in every slice, the width of a unit, or weights kept in every row where the form is sparse; of
    no meaning where it is dense."""
    method: str
    """Name of the method that chooses the factors."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options where they differ from its defaults, or all of them."""
    bits: int = 0
    """Bits per number of the result; 0: as the model stores them."""
    group: int = 0
    """Columns that share a scale, where there are bits."""
    repair: int = 0
    """Rank of a correction beside quantised numbers."""
    of: int = 0
    """Where the form is sparse: as many weights stay of every so many neighbours; 0: anywhere in the row."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What the planner expected. Editing the steps does not change it; an Outcome says what came of it."""

    sites_before: Size
    sites_after: Size
    model_before: Size
    model_after: Size
    objective: float
    """Σ over the sites of the method's objective; the rise of the loss, for methods in that unit."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps and where they come from. Sites without a step stay dense."""

    steps: tuple[Step, ...]
    method: str
    """Of every step that names no other."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of every step of ``method`` that has none of its own."""
    allocation: Allocation | None = None
    budget: Budget | None = None
    """What was asked; None for a plan written by hand."""
    fingerprint: str = ""
    """Of the model that it was made for; empty fits every model."""
    base: str = ""
    """Name of that model."""
    totals: Totals | None = None
    format_version: int = FORMAT_VERSION

    def check_model(self, fingerprint: str) -> None:
        """Raise MismatchError where this plan was made for another model."""
        if self.fingerprint and self.fingerprint != fingerprint:
            raise MismatchError(
                f"the plan was made for {self.base or 'another model'} (fingerprint "
                f"{self.fingerprint[:12]}…), but this model has {fingerprint[:12]}…. Plan again for this "
                "model, or, to use the ranks all the same, empty the plan's fingerprint."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data that :meth:`from_json` reads back to an equal plan."""
        budget = self.budget
        return {
            "format_version": self.format_version,
            "base": self.base,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "options": dict(self.options),
            "allocation": self.allocation,
            "budget": None if budget is None else {budget.unit: getattr(budget, budget.unit)},
            "totals": None if self.totals is None else asdict(self.totals),
            "steps": [self._step_json(step) for step in self.steps],
        }

    def _step_json(self, step: Step) -> dict[str, Any]:
        row: dict[str, Any] = {"site": step.site, "form": step.form, "rank": step.rank}
        row |= {name: value for name in _STORAGE if (value := getattr(step, name))}
        if step.method != self.method:
            row["method"] = step.method
        if dict(step.options) != (dict(self.options) if step.method == self.method else {}):
            row["options"] = dict(step.options)
        return row

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read a plan. Raises InputError with every unknown key, missing key and wrong value at once."""
        reader = _Reader()
        plan = reader.plan(data)
        if plan is None or reader.found:
            raise InputError(problems("this is not a plan that can be used", reader.found))
        return plan

    def dumps(self) -> str:
        """JSON text with one line per step, for editors and diffs."""
        data = self.to_json()
        steps = data.pop("steps")
        head = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)[:-2]
        rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in steps)
        body = f"[\n{rows}\n  ]" if steps else "[]"
        return f'{head},\n  "steps": {body}\n}}\n'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan whole or not at all, over what is there. Raises FileError where that fails."""
        target = Path(path)
        text = self.dumps()
        beside = ""
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
            ) as file:
                beside = file.name
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(beside).chmod(0o666 & ~mask)
            Path(beside).replace(target)
        except OSError as error:
            raise FileError(f"the plan cannot be written to {target}: {error.strerror or error}.") from error
        finally:
            if beside:
                Path(beside).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file. Raises FileError where it is no whole JSON, InputError as from_json does."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"the plan {path} cannot be read: {error}.") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileError(
                f"the plan {path} is not whole JSON: line {error.lineno}, column {error.colno}: {error.msg}."
            ) from error
        try:
            return cls.from_json(data)
        except EckartError as error:
            raise type(error)(f"{path}: {error}") from error


class _Reader:
    """Reads plain data into records and keeps what is wrong with it."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def plan(self, data: Any) -> Plan | None:
        known = [f.name for f in fields(Plan)]
        row = self.table(data, "the plan", known, required=("format_version", "method", "steps"))
        if row is None:
            return None
        version = self.value(row, "format_version", int, "the plan", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            self.found.append(
                f"format_version {version} is not {FORMAT_VERSION}, which this Eckart reads; "
                "make the plan again, or update Eckart"
            )
        method = self.value(row, "method", str, "the plan", "")
        options = self.value(row, "options", dict, "the plan", {})
        allocation = row.get("allocation")
        if allocation not in (None, "global", "uniform", "typewise"):
            self.found.append(unknown("allocation", str(allocation), ("global", "uniform", "typewise")))
            allocation = None
        rows = self.value(row, "steps", list, "the plan", [])
        steps = [self.step(i, item, method, options) for i, item in enumerate(rows)]
        named = [step.site for step in steps if step is not None]
        self.found += [f"site {name!r} has {named.count(name)} steps" for name in sorted(_repeated(named))]
        return Plan(
            steps=tuple(step for step in steps if step is not None),
            method=method,
            options=options,
            allocation=allocation,
            budget=self.budget(row.get("budget")),
            fingerprint=self.value(row, "fingerprint", str, "the plan", ""),
            base=self.value(row, "base", str, "the plan", ""),
            totals=self.totals(row.get("totals")),
        )

    def step(self, position: int, data: Any, method: str, options: Mapping[str, Any]) -> Step | None:
        where = f"step {position + 1}"
        row = self.table(data, where, [f.name for f in fields(Step)], required=("site", "form"))
        if row is None:
            return None
        site = self.value(row, "site", str, where, "")
        where = f"{where} ({site})"
        form = self.value(row, "form", str, where, "dense")
        if form not in FORMS:
            self.found.append(f"{where}: {unknown('form', form, FORMS)}")
            return None
        if form != "dense" and "rank" not in row:
            self.found.append(f"{where}: 'rank' is missing, and the form {form} needs one")
        own_method = self.value(row, "method", str, where, method)
        inherited = dict(options) if own_method == method else {}
        return Step(
            site=site,
            form=form,
            rank=self.value(row, "rank", int, where, 0),
            method=own_method,
            options=self.value(row, "options", dict, where, inherited),
            **{name: self.value(row, name, int, where, 0) for name in _STORAGE},
        )

    def budget(self, data: Any) -> Budget | None:
        if data is None:
            return None
        row = self.table(data, "budget", list(BUDGET_WORDS))
        if row is None:
            return None
        try:
            return Budget(**row)
        except InputError as error:
            self.found.append(str(error))
            return None

    def totals(self, data: Any) -> Totals | None:
        if data is None:
            return None
        names = [f.name for f in fields(Totals)]
        row = self.table(data, "totals", names, required=names)
        if row is None:
            return None
        size_names = [f.name for f in fields(Size)]
        sizes: dict[str, Size] = {}
        for name in names:
            if name == "objective":
                continue
            size = self.table(row.get(name), f"totals.{name}", size_names, required=size_names) or {}
            figures = {key: self.value(size, key, int, f"totals.{name}", 0) for key in size_names}
            sizes[name] = Size(**figures)
        return Totals(**sizes, objective=float(self.value(row, "objective", (int, float), "totals", 0.0)))

    def table(self, data: Any, where: str, known: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any] | None:
        """The mapping, less the keys that are unknown; None where it is none."""
        if not isinstance(data, Mapping):
            self.found.append(f"{where}: expected an object with keys; got {type(data).__name__}")
            return None
        names = list(known)
        self.found += [f"{where}: {unknown('key', str(key), names)}" for key in data if key not in names]
        self.found += [f"{where}: {key!r} is missing" for key in required if key not in data]
        return {str(key): value for key, value in data.items() if key in names}

    def value(self, row: Mapping[str, Any], key: str, kind: Any, where: str, default: Any) -> Any:
        """The value of a key, or the default where it is missing or of the wrong type."""
        value = row.get(key, default)
        if isinstance(value, bool) or not isinstance(value, kind):
            self.found.append(f"{where}: {key!r} expects {_WORDS[kind]}; got {value!r}")
            return default
        return value


_WORDS: dict[Any, str] = {
    int: "a whole number",
    str: "a text",
    dict: "an object",
    list: "a list",
    (int, float): "a number",
}


def _repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}
