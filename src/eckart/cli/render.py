"""Results as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eckart.records import Evaluation, Outcome, as_plain
from eckart.report import format as fmt
from eckart.report import render_dimension_terminal, render_inspection_terminal, render_terminal


def compressed(console: Console, outcome: Outcome, folder: Path) -> None:
    """What a compression did and where it lies."""
    console.print(render_terminal(outcome))
    saved(console, folder)


def saved(console: Console, folder: Path) -> None:
    """The folder, its report and what to do next."""
    _line(console, f"\nsaved to {folder}")
    if (folder / "report.html").exists():
        _line(console, f"report   {folder / 'report.html'}")


def exported(console: Console, folder: Path, size: int, note: Mapping[str, Any]) -> None:
    """An exported folder; ``note`` is what an ONNX export says of itself."""
    _line(console, f"saved to {folder} ({fmt.human_bytes(size)})")
    for side in ("inputs", "outputs"):
        for name, value in note.get(side, {}).items():
            _line(console, f"{side:8} {name} {value['type']} ({' × '.join(map(str, value['shape']))})")
    if note:
        largest, relative, limit = (note[key] for key in ("largest_difference", "relative_difference", "tolerance"))
        _line(console, f"largest difference from torch {largest:.1e}, relative {relative:.1e} (allowed {limit:.0e})")


def inspection(console: Console, found: Any, page: Path | None) -> None:
    """What an inspection found, and where its page is."""
    console.print(render_inspection_terminal(found))
    if page is not None:
        _line(console, f"\npage saved to {page}")


def dimension(console: Console, curve: Any, page: Path | None) -> None:
    """The dimension of data over scale, and where its page is."""
    console.print(render_dimension_terminal(curve))
    if page is not None:
        _line(console, f"\npage saved to {page}")


def demo(console: Console, outcome: Outcome, found: Evaluation, places: Mapping[str, Any], seconds: float) -> None:
    """The run of the demo and where everything is."""
    console.print(render_terminal(outcome, found))
    console.print()
    for name, place in places.items():
        _line(console, f"{name:8} {place}")
    _line(console, f"{'time':8} {fmt.seconds(seconds)}")


def evaluation(console: Console, found: Evaluation) -> None:
    """Quality, sizes and speed of a model beside its original."""
    table = _table("quality", "mean", "95 % interval", "n", "unit")
    for name, value in found.metrics.items():
        table.add_row(name, fmt.mean(value), fmt.interval(value), fmt.count(value.n), value.unit)
    console.print(table, "")
    table = _table("size", "original", "model", "kept")
    for name, show in (("parameters", fmt.count), ("bytes", fmt.human_bytes), ("macs", fmt.count)):
        old, new = getattr(found.base_size, name), getattr(found.model_size, name)
        words = "multiply-adds per token" if name == "macs" else name
        table.add_row(words, show(old), show(new), fmt.share(new / max(1, old)))
    if {"model", "base"} <= set(found.disk_bytes):
        old, new = found.disk_bytes["base"], found.disk_bytes["model"]
        table.add_row("bytes on disk", fmt.human_bytes(old), fmt.human_bytes(new), fmt.share(new / max(1, old)))
    console.print(table, "")
    if found.latency:
        table = _table("latency", "original", "model", "speed")
        for run in found.latency:
            name = f"batch {run.batch} × {run.length}"
            table.add_row(name, fmt.seconds(run.base), fmt.seconds(run.model), fmt.times(run.speedup))
        console.print(table, "")
    for name, value in found.protocol.items():
        _line(console, f"{name}: {_cell(value)}")
    for warning in found.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def preview(console: Console, content: Mapping[str, Any]) -> None:
    """What a run would give and take."""
    if content["steps"]:
        console.print(_records(content["steps"]), "")
    table = _table("", "before", "after", "kept")
    for part in ("sites", "model") if content["steps"] else ():
        before, after = content[f"{part}_before"], content[f"{part}_after"]
        for name, show in (("parameters", fmt.count), ("bytes", fmt.human_bytes), ("macs", fmt.count)):
            words = "multiply-adds" if name == "macs" else name
            kept = fmt.share(after[name] / max(1, before[name]))
            table.add_row(f"{part}: {words}", show(before[name]), show(after[name]), kept)
    if content["steps"]:
        console.print(table, "")
    for name, words in (
        ("moments_bytes", "moments"),
        ("peak_memory_bytes", "peak memory"),
        ("disk_bytes", "disk"),
    ):
        _line(console, f"{words:12} {fmt.human_bytes(content[name])}")
    for note in content["notes"]:
        _line(console, f"note: {note}")


def folder(console: Console, content: Mapping[str, Any]) -> None:
    """What the doctor found; the long tables of modules and the manifest only under ``--json``."""
    shown = {name: content[name] for name in content if name not in ("modules", "manifest", "problems")}
    shown["weight_files"] = {name: fmt.human_bytes(size) for name, size in content["weight_files"].items()}
    tree(console, shown)
    for problem in content["problems"]:
        console.print(Text(f"problem: {problem}", style="red"), soft_wrap=True)


def moments(console: Console, payload: Mapping[str, Any]) -> None:
    """What a calibration gathered."""
    _line(console, f"{len(payload['sites'])} sites in {fmt.seconds(payload['seconds'])}")
    tree(console, as_plain(payload["meta"]))
    _line(console, f"saved to {payload['moments']}")


def methods(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The methods with what they need and their options."""
    table = _table("method", "what it does", "needs", "options", "source", words=5)
    for row in rows:
        options = ", ".join(f"{o['name']}={o['default']}" for o in row["options"]) or "none"
        paper = f"{row['paper'].authors}, {row['paper'].year}"
        needs = ", ".join(sorted(row["needs"])) or "nothing"
        if row["entry"]:  # called in Python with keywords of its own
            needs, options = row["entry"], ""
        cells = (row["name"], row["summary"], needs, options, paper)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def claims(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each claim, whether it held, and its figures."""
    for row in rows:
        held = Text("held  ", style="green") if row["held"] else Text("FAILED", style="bold red")
        console.print(Text.assemble(held, "  ", (str(row["method"]), "bold"), f"  {fmt.seconds(row['seconds'])}"))
        _line(console, f"        {row['statement']}  ({row['source']})")
        figures = ", ".join(f"{name} {fmt.figure(value)}" for name, value in row["figures"].items())
        _line(console, f"        {figures}{'; ' + row['note'] if row['note'] else ''}")


def plan(console: Console, steps: Sequence[Any], file: Path) -> None:
    """Rank and form of every map."""
    table = _table("site", "form", "rank", "method", words=2)
    for step in steps:
        table.add_row(step.site, step.form, _cell(step.rank), step.method)
    console.print(table)
    _line(console, f"saved to {file}")


def tree(console: Console, content: Mapping[str, Any], indent: str = "") -> None:
    """Plain data: a line per value, a table per list of like objects."""
    for name, value in content.items():
        words = str(name).replace("_", " ")
        if isinstance(value, Mapping):
            _line(console, f"{indent}{words}:")
            tree(console, value, indent + "  ")
        elif isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            console.print(_records(value))
        else:
            _line(console, f"{indent}{words}: {_cell(value, str(name))}")


def _records(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = _table(*(name.replace("_", " ") for name in columns))
    for row in rows:
        table.add_row(*(Text(_cell(row.get(name), name)) for name in columns))
    return table


def _cell(value: Any, name: str = "") -> str:
    if value is None:
        return fmt.NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and name.endswith("bytes"):
        return fmt.human_bytes(value)
    if isinstance(value, int):
        return fmt.count(value)
    if isinstance(value, float):
        return fmt.figure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item, str(key))}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "none"
    return str(value)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _table(*headings: str, words: int = 1) -> Table:
    """A table whose first ``words`` columns hold words and the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < words else "right", overflow="fold")
    return table
