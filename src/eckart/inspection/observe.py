"""What stands out in a model, in sentences with their number, their reason and the next command; the worst first."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from eckart.inspection.record import MatrixFacts, Observation, Severity

ENERGIES = (99, 95, 90)
"""Energy that factors should keep, in %, the most wanted first."""
_DOMINATED = 0.5
"""Share of the energy in spikes from which a weight is said to be dominated by them."""
_FEW_SPIKES = 4
_DEFICIENT = 0.99
"""Share of the full rank below which a weight is called rank-deficient."""
_NOISE = "fits noise"


def observations(
    matrices: Sequence[MatrixFacts], source: str, only_in_base: Sequence[str] = ()
) -> tuple[Observation, ...]:
    """All that stands out, by severity, within one severity by the share of the parameters that it concerns."""
    measured = [facts for facts in matrices if not facts.skipped]
    found = [
        *_not_finite(measured),
        *_constant(measured),
        *_not_measured(matrices),
        *_dead(measured),
        *_duplicates(measured),
        *_deficient(measured),
        *_dominated(measured),
        *_noise(measured),
        *_compressible(measured, source),
        *_changes(measured, only_in_base),
    ]
    found += _nothing_broken(measured, matrices, found)
    order = list(get_args(Severity))
    sizes = {facts.name: facts.parameters for facts in matrices}
    return tuple(
        sorted(found, key=lambda o: (order.index(o.severity), -sum(sizes.get(name, 0) for name in o.matrices)))
    )


def value(facts: MatrixFacts, name: str) -> float | None:
    """The figure of a finding; None where it was not measured."""
    finding = facts.findings.get(name)
    return None if finding is None else finding.value


def _names(some: Sequence[MatrixFacts]) -> str:
    """``a``; ``a`` and ``b``; ``a`` and 5 more."""
    shown = f"`{some[0].name.removesuffix('.weight')}`"
    if len(some) == 2:
        return f"{shown} and `{some[1].name.removesuffix('.weight')}`"
    return shown if len(some) == 1 else f"{shown} and {len(some) - 1} more"


def _many(count: float, what: str) -> str:
    return f"{count:,.0f} {what}{'' if count == 1 else 's'}".replace(",", " ")


def _by(some: Sequence[MatrixFacts], key: Callable[[MatrixFacts], float]) -> list[MatrixFacts]:
    return sorted(some, key=key, reverse=True)


def _total(some: Sequence[MatrixFacts], name: str) -> float:
    return sum(value(facts, name) or 0.0 for facts in some)


def _not_finite(measured: Sequence[MatrixFacts]) -> list[Observation]:
    broken = [f for f in measured if f.findings and _lost_to_nan(f)]
    if not broken:
        return []
    return [
        Observation(
            severity="broken",
            claim=f"{_names(broken)} {'holds' if len(broken) == 1 else 'hold'} NaN or Inf.",
            number="; ".join(f"{f.name}: {_lost_to_nan(f)}" for f in broken[:3]),
            why="One such entry spreads to every output that it reaches. The weight was saved after a failed step, or "
            "cast to a type that cannot hold its largest value.",
            matrices=tuple(f.name for f in broken),
        )
    ]


def _lost_to_nan(facts: MatrixFacts) -> str:
    """The note of a finding that NaN kept from being measured."""
    notes = (note for finding in facts.findings.values() for note in finding.notes)
    return next((note for note in notes if note.endswith("NaN or Inf")), "")


def _constant(measured: Sequence[MatrixFacts]) -> list[Observation]:
    flat = [f for f in measured if value(f, "constant") == 1 and f.parameters > 1]
    if not flat:
        return []
    zero = [f for f in flat if value(f, "frobenius") == 0]
    return [
        Observation(
            severity="broken",
            claim=f"{_names(flat)} {'is' if len(flat) == 1 else 'are'} constant: all entries are equal.",
            number=f"{_many(sum(f.parameters for f in flat), 'parameter')}, {len(zero)} of {len(flat)} all zero",
            why="A constant weight was never initialised, never trained, or pruned away; zeros are usual only for the "
            "second factor of an untrained adapter.",
            matrices=tuple(f.name for f in flat),
        )
    ]


def _not_measured(matrices: Sequence[MatrixFacts]) -> list[Observation]:
    """Weights with a matrix in them that could not be measured; vectors are listed, and no warning."""
    harmless = ("left out", "indices or a mask")
    lost = [
        f
        for f in matrices
        if f.skipped and len(f.shape) > 1 and not f.tied and not any(w in f.skipped for w in harmless)
    ]
    if not lost:
        return []
    reasons: dict[str, int] = {}
    for f in lost:
        reasons[f.skipped] = reasons.get(f.skipped, 0) + 1
    shown = sorted(reasons.items(), key=lambda item: -item[1])
    return [
        Observation(
            severity="warning",
            claim=f"{_names(lost)} {'was' if len(lost) == 1 else 'were'} not measured.",
            number="; ".join(f"{count} × {reason}" for reason, count in shown[:3]),
            why="What is said of this model leaves them out. They are in the table with their reason.",
            matrices=tuple(f.name for f in lost),
        )
    ]


def _dead(measured: Sequence[MatrixFacts]) -> list[Observation]:
    dead = [f for f in measured if not value(f, "constant") and (_sides(f, "dead") > 0)]
    if not dead:
        return []
    dead = _by(dead, lambda f: _sides(f, "dead"))
    freed = sum(
        (value(f, "dead_rows") or 0) * f.in_features + (value(f, "dead_columns") or 0) * f.out_features for f in dead
    )
    rows, columns = _total(dead, "dead_rows"), _total(dead, "dead_columns")
    return [
        Observation(
            severity="warning",
            claim=f"{_names(dead)} {'has' if len(dead) == 1 else 'have'} dead rows or columns.",
            number=f"{_many(rows, 'row')}, {_many(columns, 'column')}; {_many(freed, 'parameter')}",
            why="A row of zeros gives an output that is only its bias; a column of zeros ignores an input; in a table "
            "of embeddings, an entry that was never used. They cost their share and do nothing.",
            matrices=tuple(f.name for f in dead),
        )
    ]


def _sides(facts: MatrixFacts, what: str) -> float:
    return (value(facts, f"{what}_rows") or 0.0) + (value(facts, f"{what}_columns") or 0.0)


def _duplicates(measured: Sequence[MatrixFacts]) -> list[Observation]:
    twice = [f for f in measured if not value(f, "constant") and _sides(f, "duplicate") > 0]
    if not twice:
        return []
    twice = _by(twice, lambda f: _sides(f, "duplicate"))
    rows, columns = _total(twice, "duplicate_rows"), _total(twice, "duplicate_columns")
    return [
        Observation(
            severity="warning",
            claim=f"{_names(twice)} {'repeats' if len(twice) == 1 else 'repeat'} rows or columns exactly.",
            number=f"{_many(rows, 'row')} and {_many(columns, 'column')} equal another one",
            why="Equal rows give equal outputs, so that one could stand for all; in a table of embeddings, entries "
            "that were copied or never trained apart.",
            matrices=tuple(f.name for f in twice),
        )
    ]


def _deficient(measured: Sequence[MatrixFacts]) -> list[Observation]:
    def share(f: MatrixFacts) -> float:
        return (value(f, "numerical_rank") or 0.0) / max(1, min(f.out_features, f.in_features))

    low = [f for f in measured if value(f, "numerical_rank") and share(f) < _DEFICIENT and not value(f, "constant")]
    if not low:
        return []
    low = sorted(low, key=share)
    first = low[0]
    smaller = [f for f in low if (value(f, "numerical_rank") or 0) < (value(f, "break_even_rank") or 0)]
    gain = sum(
        f.parameters - f.slices * (value(f, "numerical_rank") or 0) * (f.out_features + f.in_features) for f in smaller
    )
    return [
        Observation(
            severity="advice" if smaller else "warning",
            claim=f"{_names(low)} {'is' if len(low) == 1 else 'are'} rank-deficient.",
            number=f"rank {value(first, 'numerical_rank'):.0f} of {min(first.out_features, first.in_features)}"
            + (f"; two factors save {_many(gain, 'parameter')} without any change" if smaller else ""),
            why="The other singular values are rounding. The weight was built from factors, pruned in groups, or "
            "collapsed in training.",
            matrices=tuple(f.name for f in low),
        )
    ]


def _dominated(measured: Sequence[MatrixFacts]) -> list[Observation]:
    few = [
        f
        for f in measured
        if (value(f, "spike_energy") or 0) >= _DOMINATED and 0 < (value(f, "spikes") or 0) <= _FEW_SPIKES
    ]
    if not few:
        return []
    few = _by(few, lambda f: value(f, "spike_energy") or 0)
    return [
        Observation(
            severity="warning",
            claim=f"{_names(few)} {'is' if len(few) == 1 else 'are'} dominated by {_FEW_SPIKES} directions or fewer.",
            number=f"{100 * (value(few[0], 'spike_energy') or 0):.0f} % of the energy in "
            f"{_many(value(few[0], 'spikes') or 0, 'direction')}, the strongest case",
            why="Such a direction is often an offset that all rows share, or an outlier feature. It hides the others "
            "from measures of energy, and it is what low-bit rounding damages first.",
            matrices=tuple(f.name for f in few),
        )
    ]


def _noise(measured: Sequence[MatrixFacts]) -> list[Observation]:
    noise = [f for f in measured if f.verdict == _NOISE]
    if not noise:
        return []
    noise = _by(noise, lambda f: value(f, "bulk_fit") or 0)
    first = noise[0]
    all_of_them = len(noise) == len(measured)
    return [
        Observation(
            severity="warning",
            claim=f"{_names(noise)} {'fits' if len(noise) == 1 else 'fit'} noise.",
            number=f"{100 * (value(first, 'bulk_fit') or 0):.0f} % of the spectrum follows the law of noise, no value "
            f"above its edge {value(first, 'noise_edge') or 0:.3g}",
            why="All of them look like a random initialisation: the model may not have been trained."
            if all_of_them
            else "Nothing that training wrote into it shows in its spectrum. Do not cut its rank: noise has no few "
            "directions that hold most. See whether the model works without it.",
            matrices=tuple(f.name for f in noise),
        )
    ]


def _compressible(measured: Sequence[MatrixFacts], source: str) -> list[Observation]:
    """The size of the maps in blocks (of all, without blocks) as factors, at the highest energy that makes it less."""
    ranked = [f for f in measured if (value(f, "rank_99") or 0) > 0]
    ranked = [f for f in ranked if f.depth is not None] or ranked
    model = shlex.quote(source) if Path(source).is_dir() else "MODEL"
    if not ranked:
        return []
    for energy in ENERGIES:
        sizes = {f.name: _factored(f, energy) for f in ranked}
        smaller = [f for f in ranked if sizes[f.name] < f.parameters]
        dense, left = sum(f.parameters for f in smaller), sum(sizes[f.name] for f in smaller)
        if not smaller or left > 0.98 * dense:
            continue
        saved = {f.name: f.parameters - sizes[f.name] for f in smaller}
        first = max(smaller, key=lambda f: saved[f.name])
        keep = max(0.05, math.floor(20 * left / dense) / 20)
        return [
            Observation(
                severity="advice",
                claim=f"{_many(len(smaller), 'weight')} of {len(ranked)} {'is' if len(smaller) == 1 else 'are'} "
                f"smaller as two factors that hold {energy} % of the energy; most is saved in {_names([first])}.",
                number=f"{_many(dense, 'parameter')} become {_many(left, 'parameter')} ({100 * left / dense:.0f} %)",
                why="Energy is the squared norm of the weight, not accuracy: what the inputs use decides. With data, "
                "Eckart cuts where the loss feels it least.",
                command=f"eckart compress {model} --data DATA --keep {keep:.2g} -o OUT",
                matrices=tuple(f.name for f in smaller),
            )
        ]
    return [
        Observation(
            severity="advice",
            claim="No weight gets smaller as two factors that hold 90 % of its energy.",
            number=f"least rank at 90 % over break-even: {min(_ratio(f) for f in ranked):.2f}",
            why="The spectra are flat, as of most trained weights. Energy is not accuracy: the inputs use few of these "
            "directions, which is what methods with data find.",
            command=f"eckart compress {model} --data DATA --keep 0.6 -o OUT",
        )
    ]


def _factored(facts: MatrixFacts, energy: int) -> int:
    """Numbers of the weight with every matrix as two factors of its energy rank, where that is fewer."""
    finding = facts.findings[f"rank_{energy}"]
    ranks = finding.details.get("slices", [finding.value])
    whole = facts.out_features * facts.in_features
    pair = facts.out_features + facts.in_features
    return sum(whole if rank is None else min(whole, math.ceil(rank) * pair) for rank in ranks)


def _ratio(facts: MatrixFacts) -> float:
    return (value(facts, "rank_90") or math.inf) / max(value(facts, "break_even_rank") or 0, 1e-9)


def _changes(measured: Sequence[MatrixFacts], only_in_base: Sequence[str]) -> list[Observation]:
    changed = [f for f in measured if (value(f, "delta_relative") or 0) > 0 or value(f, "delta_rank_95")]
    equal = [f for f in measured if f.base == "equal" or value(f, "delta_relative") == 0]
    alone = [f for f in measured if f.base and f.base != "equal"]
    found = []
    if alone or only_in_base:
        reasons = "; ".join(f"{f.name}: {f.base}" for f in alone[:2])
        rest = f"{len(only_in_base)} only in the base" if only_in_base else ""
        found.append(
            Observation(
                severity="warning",
                claim=f"{len(alone) + len(only_in_base)} tensors have no counterpart to compare with.",
                number="; ".join(part for part in (reasons, rest) if part),
                why="They were added, removed, renamed or resized between the two models.",
                matrices=tuple(f.name for f in alone),
            )
        )
    if changed:
        first = max(changed, key=lambda f: value(f, "delta_relative") or 0)
        ranks = sorted(value(f, "delta_lora_rank") or 0 for f in changed)
        fits = [f for f in changed if (value(f, "delta_lora_rank") or 0) < (value(f, "break_even_rank") or math.inf)]
        found.append(
            Observation(
                severity="advice",
                claim=f"{len(changed)} of {len(changed) + len(equal)} compared weights changed, {_names([first])} the "
                f"most.",
                number=f"by {100 * (value(first, 'delta_relative') or 0):.2g} % of its norm; a LoRA that holds 90 % of "
                f"each change takes rank {ranks[len(ranks) // 2]:.0f} in the median, {ranks[-1]:.0f} at most",
                why=f"In {len(fits)} of {len(changed)} the change is smaller as a LoRA than as a weight."
                if "break_even_rank" in first.findings
                else "The rank of a change is the rank that a LoRA needs to hold it.",
                matrices=tuple(f.name for f in changed),
            )
        )
    elif equal:
        found.append(
            Observation(
                severity="good",
                claim=f"All {len(equal)} compared weights equal those of the base.",
                number="no entry differs",
                why="Nothing was trained, or the same file was given twice.",
                matrices=tuple(f.name for f in equal),
            )
        )
    return found


def _nothing_broken(
    measured: Sequence[MatrixFacts], matrices: Sequence[MatrixFacts], found: Sequence[Observation]
) -> list[Observation]:
    if not measured:
        return [
            Observation(
                severity="warning",
                claim="Nothing was measured: no tensor is a matrix of real numbers.",
                number=f"{len(matrices)} tensors, all skipped",
                why="Their reasons are in the table.",
            )
        ]
    if any(o.severity == "broken" for o in found):
        return []
    exact = all("dead_rows" in f.findings for f in measured)
    idle = any("dead" in o.claim or "exactly" in o.claim for o in found)
    checked = "no NaN, no constant weight" + ("" if idle else ", no dead or repeated row or column")
    return [
        Observation(
            severity="good",
            claim="Nothing looks broken.",
            number=f"{checked if exact else 'no NaN'} in {_many(len(measured), 'weight')}",
            why="The other tensors are vectors or listed with their reason." if len(measured) < len(matrices) else "",
        )
    ]
