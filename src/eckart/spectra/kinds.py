r"""What kind of spectrum a weight has: noise, spikes above noise, or a heavy tail.

*What it does.* Puts the figures of the noise fit and of the tail fits together into one of four words, with the reason.

*Formula.* With the fit of :func:`eckart.spectra.marchenko_pastur` (k spikes, distance D of the bulk; side p) and the
windows of :func:`eckart.spectra.farms`:

1. k ≥ 10 whose ln(λ_i/λ_k) look exponential, that is D_tail ≤ 1.25/√k (Lilliefors' test at about 1 %), with
   σ₁ ≥ 2 σ_k: **heavy tail**.
2. D ≤ max(0.05, 4/p), which noise meets in more than 95 of 100 draws: **spikes above noise** where k > 0, else
   **fits noise**.
3. ``distance_from_noise`` below 0 by more than its uncertainty: **heavy tail**.
4. Otherwise **no noise**: flat, truncated, or lighter-tailed than noise, as orthogonal and low-rank weights are.

*Cost.* That of its parts: the spectrum, and 25 windows.

*When it does not help.* These are words for a page, with thresholds chosen by hand; the figures stay beside them. Rows
of unequal scale can make noise look heavy-tailed. “Fits noise” does not say that a weight does nothing: a few trained
directions below the threshold of Baik, Ben Arous and Péché leave no trace in a spectrum.

*Departs from the paper in.* Martin and Mahoney tell six phases apart, by eye; three can be told apart by tests that
come out right on planted cases of every aspect, and a fourth word admits that none fits.

*Reference.* C. H. Martin, M. W. Mahoney, “Implicit Self-Regularization in Deep Neural Networks: Evidence from Random
Matrix Theory and Implications for Learning”, 2021, https://arxiv.org/abs/1810.01075.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(64, 128, generator=generator)
>>> print(verdict(W).details["verdict"])
fits noise
>>> W[0] += 2
>>> print(verdict(W))  # doctest: +NORMALIZE_WHITESPACE
verdict: 0.08606 (n = 64; spikes above noise: 1 above it;
at most 97 % of the bulk follows the law of noise)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from eckart.records import Claim, Diagnostic, Finding, Paper, SiteKind, Verdict
from eckart.spectra.bulk import Bulk, fit_bulk
from eckart.spectra.values import Spectrum, singular_values
from eckart.spectra.windows import farms

Word = Literal["fits noise", "spikes above noise", "heavy tail", "no noise"]

FEWEST_IN_TAIL = 10
"""Spikes that may be called a tail."""


def verdict(W: Tensor, *, kind: SiteKind | None = None, groups: int = 1) -> Finding:
    """Which of four words fits the spectrum of a weight (out, in); ``details["verdict"]`` is the word.

    The value is the share of the squared norm above the noise, in [0, 1]; ``notes`` give the word and the reason. In a
    stack of matrices each has a word (``details["words"]``) and the most frequent one is given. None for NaN, zeros,
    and fewer than 8 singular values.
    """
    s = singular_values(W, kind=kind, groups=groups)
    return judge(s, farms(W, kind=kind, groups=groups, spectrum=s))


def judge(s: Spectrum, windows: Mapping[str, Finding]) -> Finding:
    """:func:`verdict` from a spectrum and the findings of :func:`eckart.spectra.farms`."""
    if s.flaw:
        return Finding(name="verdict", value=None, notes=(s.flaw,))
    words, reasons, shares = [], [], []
    for values in s.values:
        bulk = fit_bulk(values, s)
        if isinstance(bulk, str):
            return Finding(name="verdict", value=None, notes=(bulk,))
        word, reason = _word(values, bulk, windows["distance_from_noise"])
        energies = (values / values[0]).square()
        words.append(word)
        reasons.append(reason)
        shares.append(float(energies[: bulk.spikes].sum() / energies.sum()))
    common = max(words, key=words.count)
    details: dict[str, object] = {"verdict": common}
    note = f"{common}: {reasons[words.index(common)]}"
    if len(words) > 1:
        details["words"] = words
        note = f"{common} in {words.count(common)} of {len(words)} matrices; the first: {reasons[words.index(common)]}"
    return Finding(name="verdict", value=sum(shares) / len(shares), n=s.values.numel(), notes=(note,), details=details)


def _word(values: Tensor, bulk: Bulk, windows: Finding) -> tuple[Word, str]:
    k = bulk.spikes
    most = max(0.05, 4 / values.numel())
    if k >= FEWEST_IN_TAIL and float(values[0]) >= 2 * float(values[k - 1]):
        distance = _ks_distance(values[:k])
        if distance <= 1.25 / math.sqrt(k):
            return "heavy tail", f"{k} values above noise spread like a power law (D {distance:.2f})"
    if bulk.distance <= most:
        fit = f"at most {100 * (1 - bulk.distance):.0f} % of the bulk follows the law of noise"
        return ("spikes above noise", f"{k} above it; {fit}") if k else ("fits noise", fit)
    lower, width = -float(windows), windows.uncertainty or 0.0
    if lower > width:
        return "heavy tail", f"the exponent lies {lower:.2f} ± {width:.2f} below that of noise"
    return "no noise", f"the bulk is {bulk.distance:.2f} away from the law of noise and has no heavy tail"


def _ks_distance(spikes: Tensor) -> float:
    """D between ln(λ_i/λ_k) of the spikes and the exponential law of the same mean."""
    excess = 2 * (spikes / spikes[-1]).log()
    survival = torch.exp(-excess / excess.mean())
    ranks = torch.arange(1, spikes.numel() + 1, dtype=torch.float64) / spikes.numel()
    return float(torch.maximum((survival - ranks).abs(), (survival - ranks + 1 / spikes.numel()).abs()).max())


def planted(word: Word, aspect: int, generator: torch.Generator, side: int = 192) -> Tensor:
    """(side, aspect · side) noise of entry variance 1/n: alone, with one direction of σ = 4, or with a power law of
    them.
    """
    m, n = side, side * aspect
    W: Tensor = torch.randn(m, n, dtype=torch.float64, generator=generator) / math.sqrt(n)
    count = {"fits noise": 0, "spikes above noise": 1, "heavy tail": m // 4}[word]
    if not count:
        return W
    left, right = (torch.linalg.qr(torch.randn(k, count, dtype=torch.float64, generator=generator)).Q for k in (m, n))
    tail = torch.rand(count, dtype=torch.float64, generator=generator).pow(-1 / 3)
    strengths = 4 * torch.ones(1, dtype=torch.float64) if count == 1 else 2 * tail
    W += left * strengths @ right.T
    return W


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    generator = torch.Generator().manual_seed(0)
    for word in ("fits noise", "spikes above noise", "heavy tail"):
        for aspect in (1, 2, 4, 8):
            right = [verdict(planted(word, aspect, generator)).details["verdict"] == word for _ in range(3)]
            figures[f"{word}, aspect {aspect}: named right"] = sum(right) / len(right)
            held = held and all(right)
    return Verdict(held=held, figures=figures)


METHOD = Diagnostic(
    name="verdict",
    summary="fits noise, spikes above noise, heavy tail, or none of them, with the reason",
    group="weights",
    paper=Paper(
        authors="C. H. Martin, M. W. Mahoney",
        title="Implicit Self-Regularization in Deep Neural Networks: Evidence from Random Matrix Theory and "
        "Implications for Learning",
        year=2021,
        link="https://arxiv.org/abs/1810.01075",
    ),
    entry=verdict,
    claim=Claim(
        statement="Noise, one planted direction and a planted power-law tail are each named right at aspect 1, 2, 4 "
        "and 8, three draws of each.",
        source="Martin and Mahoney 2021, section 5: random-like, bulk with spikes and heavy-tailed spectra",
        run=_run_claim,
    ),
)
