"""What the figures of an inspection are called, what they mean, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.records import Finding
from eckart.report import format as fmt


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The meaning of one finding."""

    label: str
    meaning: str
    show: fmt.Show = fmt.figure
    short: str = ""
    """For a narrow column; empty: the label."""


def _whole(n: float) -> str:
    return f"{n:.0f}"


def _signed(x: float) -> str:
    return f"{x:+.2f}"


MEASURES: dict[str, Measure] = {
    "two_nn": Measure(
        label="TwoNN", meaning="From the ratio of the distances to the second and to the first neighbour."
    ),
    "mle": Measure(
        label="MLE", meaning="From the distances to the k nearest neighbours, most likely where points lie evenly."
    ),
    "local_pca": Measure(label="Local PCA", meaning="How many directions the neighbourhood of a point is wide in."),
    "energy_dimension": Measure(
        label="Linear, 95\u00a0%", meaning="How many straight directions hold 95\u00a0% of the variance."
    ),
    "gd_max_learning_rate": Measure(
        label="Largest stable learning rate", meaning="2/λmax: above it gradient descent leaves a minimum."
    ),
    "frobenius": Measure(label="Frobenius norm", meaning="Root of the sum of all squared entries."),
    "spectral_norm": Measure(
        label="Spectral norm", meaning="Largest singular value σ₁: the most that a unit input grows."
    ),
    "stable_rank": Measure(
        short="Stable",
        label="Stable rank",
        meaning="‖W‖²_F/σ₁²: 1 where one direction holds everything, the smaller side where all are alike.",
    ),
    "effective_rank": Measure(
        label="Effective rank",
        meaning="exp of the entropy of the singular values: how many directions matter, counted softly.",
    ),
    "effective_rank_energy": Measure(
        label="Effective rank of the energy", meaning="exp of the entropy of σ² instead of σ; never larger."
    ),
    "numerical_rank": Measure(
        label="Numerical rank", meaning="Singular values that rounding does not explain.", show=_whole
    ),
    "participation_ratio": Measure(
        label="Participation ratio", meaning="(Σσ²)²/Σσ⁴: how many directions share the energy."
    ),
    **{
        f"rank_{share}": Measure(
            label=f"Rank at {share}{fmt.SPACE}%",
            meaning=f"Fewest directions that hold {share}{fmt.SPACE}% of the energy Σσ².",
            show=_whole,
            short=f"r{share}",
        )
        for share in (90, 95, 99)
    },
    "break_even_rank": Measure(
        short="Break\u2011even",
        label="Break\u2011even rank",
        meaning="mn/(m+n): below it two factors take fewer numbers than the matrix, above it more.",
        show=_whole,
    ),
    "spikes": Measure(
        label="Spikes", meaning="Singular values above the edge of what noise of this shape and size has.", show=_whole
    ),
    "spike_energy": Measure(label="Spike energy", meaning="Share of the energy in the spikes.", show=fmt.share),
    "noise_edge": Measure(
        label="Noise edge",
        meaning="Largest singular value that noise of the bulk's size has, by the law of Marchenko and Pastur.",
    ),
    "verdict": Measure(
        label="Kind",
        meaning="Fits noise, spikes above noise, heavy tail, or no noise; the figure is the share of energy in the "
        "spikes.",
        show=fmt.share,
    ),
    "alpha_farms": Measure(
        label="α, fixed aspect",
        meaning="Exponent of the tail of the eigenvalues, pooled over windows of one shape (FARMS), so that the "
        "shape of the matrix does not enter. To be read only beside what noise scores.",
    ),
    "alpha_ks": Measure(
        label="α, best fit",
        meaning="Exponent of the tail of the eigenvalues where a power law fits it best. To be read only beside what "
        "noise scores.",
    ),
    "ks_distance": Measure(
        label="Misfit of the tail", meaning="Largest distance between the tail and its best power law, from 0 to 1."
    ),
    "tail_size": Measure(label="Tail", meaning="Eigenvalues in the best-fitting tail.", show=_whole),
    "distance_from_noise": Measure(
        short="α\u00a0−\u00a0α₀",
        label="α\u00a0−\u00a0α\u00a0noise",
        meaning="The exponent less that of pure noise of the same shape, α₀. Near 0: cannot be told from noise; below "
        "0: a heavier tail than noise has.",
        show=_signed,
    ),
    "noise_scale": Measure(
        label="Noise scale", meaning="Standard deviation of an entry of the noise that fits the bulk best."
    ),
    "bulk_fit": Measure(
        label="Fits noise", meaning="At most this share of the bulk follows the law of noise.", show=fmt.share
    ),
    "condition_number": Measure(label="Condition number", meaning="Largest over smallest singular value."),
    "not_finite": Measure(label="Not finite", meaning="Entries that are NaN or infinite.", show=_whole),
    "constant": Measure(label="Constant", meaning="1 where all entries are the same.", show=_whole),
    "dead_rows": Measure(label="Dead rows", meaning="Outputs whose weights are all zero.", show=_whole),
    "dead_columns": Measure(label="Dead columns", meaning="Inputs whose weights are all zero.", show=_whole),
    "duplicate_rows": Measure(label="Duplicate rows", meaning="Outputs that repeat another one.", show=_whole),
    "duplicate_columns": Measure(label="Duplicate columns", meaning="Inputs that repeat another one.", show=_whole),
    "delta_relative": Measure(
        label="Change", meaning="‖ΔW‖/‖W₀‖: size of the change against that of the base.", show=fmt.percent
    ),
    "delta_lora_rank": Measure(
        label="LoRA rank", meaning="Fewest directions that hold nine tenths of the energy of the change.", show=_whole
    ),
    "delta_overlap_left": Measure(
        label="Overlap of outputs",
        meaning="Share of the change’s output directions that the base’s leading ones hold; unrelated ones share "
        "k/out.",
        show=fmt.share,
    ),
    "delta_overlap_right": Measure(
        label="Overlap of inputs",
        meaning="Share of the change’s input directions that the base’s leading ones hold; unrelated ones share k/in.",
        show=fmt.share,
    ),
    "delta_gain": Measure(
        label="Amplification", meaning="Size of the change over that of the base in the change’s own directions."
    ),
}
"""By the names that :mod:`eckart.spectra` gives; others are shown under their own name."""

_DELTA = "delta_"


def heading(name: str) -> str:
    """The label of a narrow column."""
    return measure_of(name).short or measure_of(name).label


def measure_of(name: str) -> Measure:
    """The meaning of a finding; one of a difference is that of its base; an unknown one keeps its own name."""
    if name in MEASURES:
        return MEASURES[name]
    if name.startswith(_DELTA) and name.removeprefix(_DELTA) in MEASURES:
        known = MEASURES[name.removeprefix(_DELTA)]
        return Measure(
            label=f"ΔW: {known.label}", meaning=f"Of the difference to the base. {known.meaning}", show=known.show
        )
    plain = name.removeprefix(_DELTA).replace("_", " ")
    plain = f"ΔW: {plain}" if name.startswith(_DELTA) else plain[:1].upper() + plain[1:]
    return Measure(label=plain, meaning="")


def value_text(finding: Finding | None) -> str:
    """The figure alone: ``12.4``, ``≥ 15``, ``–`` where there is none; a verdict as its word."""
    if finding is None or finding.value is None:
        return fmt.NONE
    word = finding.details.get("verdict")
    if isinstance(word, str):
        return word.removesuffix(" above noise")
    return f"{'≥' + fmt.SPACE if finding.at_least else ''}{measure_of(finding.name).show(finding.value)}"


def sure(findings: list[Finding]) -> str:
    """How far the figures of one measure can be trusted, in words."""
    measured = [found for found in findings if found.value is not None]
    if not measured:
        return "not measured"
    words = []
    if all(found.uncertainty == 0 for found in measured):
        words.append("exact up to rounding")
    elif any(found.uncertainty for found in measured):
        widest = max(found.uncertainty or 0.0 for found in measured)
        words.append(f"estimate, 95{fmt.SPACE}% within ±{fmt.SPACE}{fmt.figure(widest, 2)} or less")
    else:
        words.append("estimate, its error is not known")
    bounds = sum(found.at_least for found in measured)
    if bounds:
        words.append(f"a lower bound in {bounds} of {len(measured)}")
    if len(measured) < len(findings):
        words.append(f"not measured in {len(findings) - len(measured)}")
    return "; ".join(words)
