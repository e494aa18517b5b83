"""What the inspection page and the terminal show, worked out of an Inspection. Templates only place it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from eckart.records import Finding
from eckart.report import charts
from eckart.report import format as fmt
from eckart.report.layout import group_of, stack_of
from eckart.report.measures import measure_of, sure, value_text
from eckart.report.palette import step

if TYPE_CHECKING:
    from eckart.inspection.record import Inspection, MatrixFacts, Observation, Severity

MOST_OBSERVATIONS = 7
"""How many are shown before the others are folded away."""
COLUMNS = (
    *("stable_rank", "rank_95", "rank_99", "break_even_rank", "spikes", "distance_from_noise", "verdict"),
    *("delta_relative", "delta_lora_rank"),
)
"""Findings that are columns of the table, where anything has them."""
SEVERITIES: dict[Severity, tuple[str, str]] = {
    "broken": ("✕", "broken"),
    "warning": ("▲", "warning"),
    "advice": ("→", "advice"),
    "good": ("✓", "good"),
}
"""A sign and a word for each, so that none rests on its colour."""
MOST_POINTS = 32_000
"""Points of spectra that a page holds: 142 for each of 224 weights."""
_ENERGY = "rank_95"


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """One tensor in the table."""

    index: int
    facts: MatrixFacts
    stack: str
    role: str
    depth: int | None
    group: str
    name: str
    full_name: str
    shape: str
    parameters: str
    cells: tuple[tuple[str, float | None], ...]
    """(text, number to sort by) for each column."""
    ratio: float | None
    """Rank at 95 % of the energy over the break-even rank; without ranks, stable rank over full rank."""
    step: int
    noted: Severity | None
    """The worst that an observation says of it; None where there is nothing but good."""
    sparkline: Markup


def rows(inspection: Inspection) -> tuple[WeightRow, ...]:
    """Every tensor: the measured ones in the order of the model, then the others."""
    worst: dict[str, Severity] = {}
    for severity in ("advice", "warning", "broken"):
        for observation in inspection.observations:
            if observation.severity == severity:
                worst.update(dict.fromkeys(observation.matrices, severity))
    shown = columns(inspection)
    ordered = sorted(inspection.matrices, key=lambda facts: bool(facts.skipped))
    return tuple(_row(i, facts, shown, worst.get(facts.name)) for i, facts in enumerate(ordered))


def columns(inspection: Inspection) -> tuple[str, ...]:
    """The findings that are columns of the table."""
    known = set(finding_names(inspection))
    return tuple(name for name in COLUMNS if name in known)


def finding_names(inspection: Inspection) -> tuple[str, ...]:
    """Every finding that any weight has, in the order of their first appearance."""
    return tuple(dict.fromkeys(name for facts in inspection.matrices for name in facts.findings))


def ranked(inspection: Inspection) -> bool:
    """Whether ranks were measured; the quick tier has none."""
    return _ENERGY in finding_names(inspection)


def ratio_words(inspection: Inspection) -> str:
    """What the numbers of the map are."""
    if ranked(inspection):
        return (
            f"the rank that holds 95{fmt.SPACE}% of the energy over the break-even rank: below 1 two factors are "
            "smaller than the matrix, from 1 on nothing is gained"
        )
    return "the stable rank over the full rank: near 0 a few directions hold everything, at 1 all are alike"


def cell_text(ratio: float | None) -> str:
    """The number of a cell of the map, short enough for a narrow one: ``1.3``, ``.97``."""
    return fmt.NONE if ratio is None else f"{ratio:.1f}" if ratio >= 0.995 else f"{ratio:.2f}"[1:]


def verdict(inspection: Inspection) -> tuple[tuple[str, bool], ...]:
    """The inspection in a few sentences, as pieces (text, whether it is one of the numbers that matter)."""
    measured = [facts for facts in inspection.matrices if not facts.skipped]
    total = sum(facts.parameters for facts in inspection.matrices)
    part = fmt.share(sum(facts.parameters for facts in measured) / max(1, total))
    pieces: list[tuple[str, bool]] = [
        (f"{inspection.title} holds ", False),
        (fmt.count(total), True),
        (f" parameters, {'nearly all' if part == fmt.share(1) else part} of them in ", False),
        (_several(len(measured), "measured weight"), True),
        (". ", False),
    ]
    dense, factored = factored_size(measured)
    if dense:
        pieces += [
            (f"Cut to the rank that keeps 99{fmt.SPACE}% of each one’s energy, these would take ", False),
            (fmt.count(factored), True),
            (f" numbers instead of {fmt.count(dense)} (", False),
            (fmt.share(factored / dense), True),
            ("). ", False),
        ]
    broken, warnings = (
        sum(o.severity == severity for o in inspection.observations) for severity in ("broken", "warning")
    )
    if broken:
        pieces += [
            (f"{_several(broken, 'finding')} {'says' if broken == 1 else 'say'} that something is broken.", True)
        ]
    elif warnings:
        pieces += [("Nothing looks broken; ", False), (_several(warnings, "warning"), True), (".", False)]
    elif not measured:
        pieces += [("Nothing was measured.", True)]
    else:
        pieces += [("Nothing looks broken.", True)]
    return tuple(piece for piece in pieces if piece[0])


def verdict_line(inspection: Inspection) -> str:
    """The verdict as plain text."""
    return "".join(text for text, _ in verdict(inspection))


def factored_size(measured: Sequence[MatrixFacts]) -> tuple[int, int]:
    """Numbers of the weights whose rank at 99 % is known: as they are, and as two factors where that is fewer."""
    dense = factored = 0
    for facts in measured:
        finding = facts.findings.get("rank_99")
        if finding is not None and finding.value is not None:
            dense += facts.parameters
            ranks = finding.details.get("slices", [finding.value] * facts.slices)
            whole = facts.parameters // max(1, len(ranks))
            pair = facts.out_features + facts.in_features
            factored += sum(whole if rank is None else min(whole, math.ceil(rank) * pair) for rank in ranks)
    return dense, factored


def split_observations(inspection: Inspection) -> tuple[tuple[Observation, ...], tuple[Observation, ...]]:
    """Those that are shown at once and those that are folded away."""
    ordered = sorted(inspection.observations, key=lambda o: list(SEVERITIES).index(o.severity))
    return tuple(ordered[:MOST_OBSERVATIONS]), tuple(ordered[MOST_OBSERVATIONS:])


def meta(inspection: Inspection) -> dict[str, str]:
    """What the page says under its title; the command has a place of its own."""
    shown: dict[str, str] = {"tier": inspection.tier}
    shown |= {"compared with": inspection.base} if inspection.base else {}
    for name, value in inspection.meta.items():
        if name == "command" or value in (None, "", (), []):
            continue
        words = name.replace("_", " ")
        if name == "seconds" and isinstance(value, (int, float)):
            words, value = "took", fmt.seconds(value)
        elif name.endswith("bytes") and isinstance(value, int):
            value = fmt.human_bytes(value)
        elif isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        shown[words] = str(value)
    return shown


def skipped(inspection: Inspection) -> tuple[tuple[str, int], ...]:
    """Each reason for which something was not measured, and how often."""
    return _counted(facts.skipped for facts in inspection.matrices)


def uncompared(inspection: Inspection) -> tuple[tuple[str, int], ...]:
    """Each reason for which a measured weight was not compared with the base, and how often."""
    return _counted(facts.base for facts in inspection.matrices if not facts.skipped)


def method(inspection: Inspection) -> tuple[tuple[str, str, str], ...]:
    """For every finding of the page its label, its meaning and how sure it is."""
    found: dict[str, list[Finding]] = {}
    for facts in inspection.matrices:
        for name, finding in facts.findings.items():
            found.setdefault(name, []).append(finding)
    return tuple((measure_of(name).label, measure_of(name).meaning, sure(some)) for name, some in found.items())


def data(inspection: Inspection, table: Sequence[WeightRow]) -> dict[str, Any]:
    """What the page's script draws and offers for download, at most MOST_POINTS points of spectra.

    A finding is a number (exact, nothing to say of it), null, or [value, uncertainty, at least, notes], notes being
    indices into ``notes``. A spectrum is [places, σ₁, σ, first noise, noise, energy] with ``places`` an index, σ and
    noise in thousandths of a decade below their first, each less the one before, and energy in 1/10000 likewise.
    """
    names = finding_names(inspection)
    notes: dict[str, int] = {}
    points = max(24, MOST_POINTS // max(1, sum(bool(row.facts.singular_values) for row in table)))
    places: dict[tuple[int, ...], int] = {}
    spectra = {}
    for row in table:
        spectrum = _spectrum(row.facts, points, places)
        if spectrum:
            spectra[str(row.index)] = spectrum
    return {
        "title": inspection.title,
        "source": inspection.source,
        "tier": inspection.tier,
        "base": inspection.base,
        "findings": [[name, measure_of(name).label, measure_of(name).meaning] for name in names],
        "rows": [
            [
                *(row.full_name, row.facts.dtype, list(row.facts.shape), row.facts.parameters, row.facts.role),
                *(row.depth, row.facts.skipped, row.facts.out_features, row.facts.in_features),
                [_packed(row.facts.findings.get(name), notes) for name in names],
            ]
            for row in table
        ],
        "notes": list(notes),
        "places": [list(found) for found in places],
        "spectra": spectra,
    }


def _row(index: int, facts: MatrixFacts, shown: Sequence[str], noted: Severity | None) -> WeightRow:
    stack = stack_of(facts.name, facts.depth, facts.role)
    name = facts.name.removesuffix(".weight")
    ratio = _ratio(facts)
    return WeightRow(
        index=index,
        facts=facts,
        stack=stack,
        role="" if facts.skipped else facts.role,
        depth=facts.depth,
        group=group_of(name, stack, facts.depth, facts.role),
        name=fmt.middle(name),
        full_name=facts.name,
        shape=_shape(facts),
        parameters=fmt.count(facts.parameters),
        cells=tuple((_cell(facts, column), _value(facts, column)) for column in shown),
        ratio=ratio,
        step=step(1 - min(1.0, (ratio or 0.0) / 2)) if _ENERGY in facts.findings else step(1 - (ratio or 0.0)),
        noted=noted,
        sparkline=charts.sparkline(facts.singular_values, facts.places) if facts.singular_values else Markup(),
    )


def _counted(reasons: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """The reasons that are not empty, the most frequent first."""
    return tuple(Counter(reason for reason in reasons if reason).most_common())


def _shape(facts: MatrixFacts) -> str:
    """in × out for a matrix, else the shape as stored."""
    times = f"{fmt.SPACE}×{fmt.SPACE}"
    if facts.out_features and facts.in_features:
        many = f"{times}{facts.slices}" if facts.slices > 1 else ""
        return f"{facts.in_features}{times}{facts.out_features}{many}"
    return times.join(map(str, facts.shape)) or "scalar"


def _cell(facts: MatrixFacts, column: str) -> str:
    """A figure of the table; where a weight equals that of the base, that."""
    if column.startswith("delta_") and facts.base == "equal":
        return "equal"
    return value_text(facts.findings.get(column))


def _ratio(facts: MatrixFacts) -> float | None:
    energy, even = _value(facts, _ENERGY), _value(facts, "break_even_rank")
    if energy is not None and even:
        return energy / even
    stable, full = _value(facts, "stable_rank"), min(facts.out_features, facts.in_features)
    return stable / full if stable is not None and full else None


def _value(facts: MatrixFacts, name: str) -> float | None:
    finding = facts.findings.get(name)
    return None if finding is None else finding.value


def _several(n: int, noun: str) -> str:
    return f"{fmt.count(n)} {noun}{'' if n == 1 else 's'}"


def _packed(finding: Finding | None, notes: dict[str, int]) -> Any:
    if finding is None:
        return None
    value = _short(finding.value)
    noise = finding.details.get("noise")
    beside = [f"noise of that shape scores {fmt.figure(noise)}"] if isinstance(noise, float) else []
    said = [notes.setdefault(note, len(notes)) for note in (*beside, *finding.notes)]
    if value is not None and finding.uncertainty == 0 and not finding.at_least and not said:
        return value
    return [value, _short(finding.uncertainty), int(finding.at_least), said]


def _short(x: float | None) -> float | int | None:
    if x is None or not math.isfinite(x):
        return None
    return int(x) if float(x).is_integer() and abs(x) < 1e15 else float(f"{x:.6g}")


def _spectrum(facts: MatrixFacts, points: int, places: dict[tuple[int, ...], int]) -> list[Any] | None:
    """The spectrum in whole numbers, thinned to ``points``; None where there is nothing to draw."""
    sigma = facts.singular_values
    if not sigma or not sigma[0] > 0:
        return None
    last = len(sigma) - 1
    kept = range(len(sigma)) if last < points else sorted({round(i * last / (points - 1)) for i in range(points)})
    at = tuple(facts.places[i] for i in kept) if facts.places else tuple(kept)
    noise = [facts.noise[i] for i in kept] if len(facts.noise) == len(sigma) else []
    energy = [facts.energy[i] for i in kept] if len(facts.energy) == len(sigma) else []
    return [
        places.setdefault(at, len(places)),
        _short(sigma[0]),
        list(_steps(_decades([sigma[i] for i in kept]))),
        _short(noise[0]) if noise and noise[0] > 0 else None,
        list(_steps(_decades(noise))) if noise and noise[0] > 0 else [],
        list(_steps(round(10_000 * e) for e in energy)),
    ]


def _decades(values: Sequence[float]) -> list[int]:
    """Thousandths of a decade below the first; what is zero lies 20 decades below."""
    return [max(-20_000, round(1000 * math.log10(v / values[0]))) if v > 0 else -20_000 for v in values]


def _steps(values: Sequence[int] | Iterator[int]) -> Iterator[int]:
    """Each value less the one before; small numbers take few digits."""
    before = 0
    for value in values:
        yield value - before
        before = value
